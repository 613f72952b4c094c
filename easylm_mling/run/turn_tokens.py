"""Turn tokens that the base of adapters never learnt: their rows stay as they are, so the model would not learn to stop."""

from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import orjson
from rich.console import Console

from easylm_mling.config import ModelConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.conversations.encoding import UNTRAINED
from easylm_mling.data.documents import conversation_encoder, has_conversations
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.monitoring.console import warn

# A row that was never trained is nearly zero: in Llama 3's base a hundredth of the others, and less.
_SMALL = 0.1
_EXAMPLE = orjson.dumps(
    {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}
)


def turn_tokens(catalog: Catalog, tokenizer: Tokenizer) -> dict[int, str]:
    """Return the control tokens, id -> name, that the templates of the sources write around a question and its answer."""
    ids: set[int] = set()
    for source in catalog.sources.values():
        if has_conversations(source):
            with suppress(ValueError):  # a template that cannot write this one; its own rows are judged one by one
                ids |= {*(conversation_encoder(source, tokenizer).encode(_EXAMPLE) & ~UNTRAINED).tolist()}
    return {i: tokenizer.piece(i) for i in sorted(ids & {*tokenizer.control_ids})}


def warn_of_turn_tokens(console: Console, frozen: dict, model: ModelConfig, catalog: Catalog, tokenizer: Tokenizer):
    """Print what `warnings_of_turn_tokens` returns. Collective."""
    for line in warnings_of_turn_tokens(frozen, model, catalog, tokenizer):
        warn(console, line)


def warnings_of_turn_tokens(frozen: dict, model: ModelConfig, catalog: Catalog, tokenizer: Tokenizer) -> list[str]:
    """Return a line for each turn token whose row, in the embedding or the head, is far smaller than the median. Collective.

    `frozen` are the parameters beside adapters; without them every row is trained, and there is nothing to say.
    """
    tokens = turn_tokens(catalog, tokenizer) if frozen else {}
    if not tokens:
        return []
    shares = {}
    for name in ("embed_tokens",) if model.tie_word_embeddings else ("embed_tokens", "lm_head"):
        norms, median = _row_norms(frozen[name], np.asarray([*tokens]))
        for (token, piece), norm in zip(tokens.items(), np.asarray(norms), strict=True):
            shares[token, piece] = min(shares.get((token, piece), 1.0), float(norm) / float(median))
    return [
        f"{piece} (id {token}) was not trained in the base: its row is {share:.2g} of the median's size, and adapters leave it so. "
        "The model may never write it, and not stop. Use a template of words (alpaca, aog), or a base that knows it"
        for (token, piece), share in shares.items()
        if share < _SMALL
    ]


@jax.jit
def _row_norms(table: jax.Array, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return the norms of these rows of a table [V, D], and the median of all norms, float32."""
    norms = jnp.sqrt(jnp.sum(jnp.square(table.astype(jnp.float32)), axis=-1))
    return norms[rows], jnp.median(norms)
