"""Generate text: a key/value cache, one prefill, and one compiled loop over new tokens.

Axis letters: B prompts, P prompt slots, S cache slots, K key/value heads, H head_dim, V vocabulary.

Position p of a row lies in slot p modulo S. A global layer has a slot for every position, P and the room for new tokens. A
local layer has one for each position of its window, and a new token takes the place of the oldest.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from easylm_mling.checkpoint.parameters import load_params
from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.files import JSON, MODEL, TOKENIZER_FOLDER, tokenizer_file
from easylm_mling.data.tokenization.tokenizer import Tokenizer, fingerprints, stored_fingerprints
from easylm_mling.errors import ConfigError, check
from easylm_mling.hf.config import model_config_from_hf
from easylm_mling.hf.exporting import stored_model
from easylm_mling.hf.importing import open_weights, read_params, widest_mesh
from easylm_mling.hf.tokenizer import own_tokenizer
from easylm_mling.model.attention import QUERY_CHUNK, attention, masked_attention
from easylm_mling.model.decoder import ForwardOptions, Gemma, logits
from easylm_mling.model.precision import products_in
from easylm_mling.model.remat import Remat
from easylm_mling.storage.object_store import small_files
from easylm_mling.training.state import abstract_params, model_graph

# Lengths are rounded up to a multiple of this, so that prompts of other lengths reuse the compiled program.
SLOTS = 64


def read_model(path: str | Path, step: int | None = None) -> ModelConfig:
    """Return the config of the model that `load_model` would load, and none of its parameters. Raises as it does."""
    if not (Path(path) / "config.json").is_file():
        return stored_model(path, step)
    if step is not None:
        raise ConfigError(f"{path}: a Hugging Face directory has no steps; leave out step={step}")
    return model_config_from_hf(path)


def load_model(
    path: str | Path, mesh: Mesh | None = None, step: int | None = None
) -> tuple[nnx.GraphDef, dict, ModelConfig]:
    """Load (graph, float32 params, config) from a Hugging Face directory, a run or an imported checkpoint.

    Parameters are sharded over `mesh` (default: as many devices as `hidden_size` divides over). Raises ConfigError if `path`
    is none of these or has no such `step`.
    """
    model = read_model(path, step)
    if (Path(path) / "config.json").is_file():
        params = read_params(open_weights(path, model), model, mesh or widest_mesh(model))
    else:
        params = load_params(path, abstract_params(model, mesh or widest_mesh(model)), step)
    return model_graph(model), params, model


def generate(
    graph: nnx.GraphDef,
    params: dict,
    model: ModelConfig,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> list[list[int]]:
    """Return the new tokens of each prompt: at most `max_new_tokens`, and EOS, or another stop token, last where the model ended the text.

    Temperature 0 takes the most probable token. Otherwise row b's n-th token is drawn with the key of (seed, b, n): from the
    `top_k` most probable ones, and of those from the smallest set with probability `top_p` or more.

    The caller puts BOS into the prompts. Raises ConfigError for settings out of range, an empty prompt, a token outside the
    vocabulary, and a text that would pass `max_position_embeddings`.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, dtype)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    unit = SLOTS if lengths.max() <= QUERY_CHUNK else QUERY_CHUNK
    tokens = np.full((len(prompts), -(-lengths.max() // unit) * unit), max(0, model.pad_token_id), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    with products_in(dtype):
        new, count = _generate(
            params,
            tokens,
            lengths,
            jax.random.key(seed),
            np.int32(max_new_tokens),
            (np.float32(temperature or 1.0), np.int32(top_k or model.vocab_size), np.float32(top_p)),
            graph=graph,
            room=-(-max_new_tokens // SLOTS) * SLOTS,
            greedy=temperature == 0,
            dtype=jnp.dtype(dtype),
        )
    return [row[:n].tolist() for row, n in zip(on_host(new), on_host(count), strict=True)]


def on_host(x: jax.Array) -> np.ndarray:
    """Return the whole array, also if other processes hold parts of it. Collective."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def continue_texts(
    graph: nnx.GraphDef,
    params: dict,
    model: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    **settings,
) -> list[str]:
    """Return the text that the model writes after each prompt, without the prompt. `settings` are those of `generate`.

    Puts one BOS before each prompt, if the model has one. With none, or with two, Gemma's text is far worse.
    """
    first = [model.bos_token_id] if model.bos_token_id >= 0 else []
    encoded = [[*first, *ids.tolist()] for ids in tokenizer.encode(list(prompts))]
    texts = generate(graph, params, model, encoded, max_new_tokens, **settings)
    ends = {model.eos_token_id, *model.stop_token_ids}
    # The model may have more rows than the tokenizer has pieces; those stand for no text.
    return [tokenizer.decode([i for i in ids if i not in ends and i < tokenizer.vocab_size]) for ids in texts]


def sample_text(
    path: str | Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    tokenizer_path: str | Path | None = None,
    step: int | None = None,
    **settings,
) -> list[str]:
    """Call `continue_texts` with the model at `path` and the tokenizer at `tokenizer_path` (default: the model's own)."""
    tokenizer = Tokenizer(str(tokenizer_path or find_tokenizer(path, step)))
    tokenizer.check_model(read_model(path, step))
    graph, params, model = load_model(path, step=step)
    return continue_texts(graph, params, model, tokenizer, prompts, max_new_tokens, **settings)


def find_tokenizer(path: str | Path, step: int | None = None) -> Path:
    """Return the tokenizer's file in `path`, or the one in its tokenizer folder that the checkpoint was trained with.

    Raises ConfigError if there is none.
    """
    files = small_files(path)
    if fingerprints(files):
        return tokenizer_file(files)
    if fingerprints(files / TOKENIZER_FOLDER):
        stored = stored_fingerprints(load_info(path, step))
        folder = own_tokenizer(files, stored)
        # A run has trained with one of the files; an import leaves the choice.
        own = [name for name, value in fingerprints(folder).items() if value in stored]
        return folder / own[0] if own else tokenizer_file(folder)
    raise ConfigError(f"{path}: no {MODEL} here or in {TOKENIZER_FOLDER}/, and no {JSON}; name one (--tokenizer)")


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p, dtype):
    check(max_new_tokens >= 0, f"max_new_tokens={max_new_tokens} must be zero or more")
    check(0 <= temperature < float("inf"), f"temperature={temperature} must be zero (greedy) or a positive number")
    check(top_k is None or top_k > 0, f"top_k={top_k} must be positive; leave it out to keep every token")
    check(0 < top_p <= 1, f"top_p={top_p} must be above 0 and at most 1")
    check(dtype in ("bfloat16", "float32"), f"dtype={dtype!r} must be 'bfloat16' or 'float32'")
    for i, prompt in enumerate(prompts):
        check(len(prompt) > 0, f"prompt {i} is empty; start it with BOS ({model.bos_token_id})")
        check(
            all(0 <= t < model.vocab_size for t in prompt),
            f"prompt {i} holds a token outside the vocabulary of {model.vocab_size}; use the model's own tokenizer",
        )
        check(
            len(prompt) + max_new_tokens <= model.max_position_embeddings,
            f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that passes "
            f"max_position_embeddings={model.max_position_embeddings}; shorten one of them",
        )


@partial(jax.jit, static_argnames=("graph", "room", "greedy", "dtype"))
def _generate(params, tokens, lengths, key, limit, settings, *, graph, room: int, greedy: bool, dtype):
    """Return new tokens [B, room] int32 and how many of them are valid [B], for prompts [B, P] of `lengths` [B].

    `limit` (at most `room`) and `settings` are traced, so other values do not compile again.
    """
    model = nnx.merge(graph, params)
    eos = model.config.eos_token_id
    ends = jnp.asarray([eos, *model.config.stop_token_ids], jnp.int32)
    hidden, caches = prefill(model, tokens, lengths, room, dtype)
    B = tokens.shape[0]
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def choose(hidden, n):
        scores = logits(hidden, model.head, model.config.final_logit_softcapping)
        return jnp.argmax(scores, axis=-1).astype(jnp.int32) if greedy else _sample(key, n, scores, *settings)

    def proceed(carry):
        n, _, _, _, ended, _ = carry
        return (n < limit) & ~jnp.all(ended)

    def advance(carry):
        n, hidden, caches, new, ended, count = carry
        token = choose(hidden, n)
        new = new.at[:, n].set(jnp.where(ended, eos, token))
        count = jnp.where(ended, count, n + 1)
        hidden, caches = decode(model, token, lengths + n, caches, dtype)
        return n + 1, hidden, caches, new, ended | jnp.isin(token, ends), count

    zero = jnp.zeros((B,), jnp.int32)
    start = (jnp.int32(0), last, caches, jnp.full((B, room), eos, jnp.int32), zero == 1, zero)
    _, _, _, new, _, count = jax.lax.while_loop(proceed, advance, start)
    return new, count


def prefill(model: Gemma, tokens, lengths, room: int, dtype):
    """Compute the prompts' hidden states [B, P, D], and each layer's cache (k, v) [B, S, K, H] of the prompts.

    Padding needs no mask: it stands to the right of every real token, and its slots are overwritten before a later token can
    see them.
    """
    B, P = tokens.shape

    def attend(q, k, v, window, _):
        slots = min(window or P + room, P + room)
        context = attention(q, k, v, jnp.ones((B, P), jnp.int32), window, model.config.attn_logit_softcapping)
        return context, (_in_slots(k, lengths, slots), _in_slots(v, lengths, slots)), (k, v)

    positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    return model.run(tokens, positions, attend, None, ForwardOptions(dtype, Remat("none")))


def _in_slots(x, lengths, slots: int):
    """Return [B, S, K, H], each slot with the newest of its positions before `lengths`, of the prompts' [B, P, K, H]."""
    if slots >= x.shape[1]:
        return jnp.pad(x, [(0, 0), (0, slots - x.shape[1]), (0, 0), (0, 0)])
    held = _held(lengths - 1, slots)
    return jnp.take_along_axis(x, jnp.maximum(held, 0)[..., None, None], axis=1)


def _held(newest, slots: int):
    """Return the position in each slot [B, S] when position `newest` [B] was the last written; negative: none."""
    return newest[:, None] - (newest[:, None] - jnp.arange(slots)) % slots


def decode(model: Gemma, token, position, caches, dtype):
    """Compute the hidden states [B, D] of one more `token` [B] at `position` [B], and the caches with it."""
    row = jnp.arange(token.shape[0])

    def attend(q, k, v, _, cache):
        slots = (cache or (k, v))[0].shape[1]
        if cache is None:
            keys, values = k, v  # shared: the slots of an earlier layer
        else:
            keys, values = (
                old.at[row, position % slots].set(new[:, 0]) for old, new in zip(cache, (k, v), strict=True)
            )
        mask = _held(position, slots) >= 0  # what the window hides is not there
        context = masked_attention(q, keys, values, mask[:, None], model.config.attn_logit_softcapping)
        return context, (keys, values), (keys, values)

    options = ForwardOptions(dtype, Remat("none"))
    hidden, caches = model.run(token[:, None], position[:, None], attend, caches, options)
    return hidden[:, 0], caches


def _sample(key, n, scores, temperature, top_k, top_p):
    """Draw one token [B] from float32 `scores` [B, V]."""
    allowed = allowed_scores(scores, temperature, top_k, top_p)
    keys = jax.vmap(lambda b: jax.random.fold_in(jax.random.fold_in(key, b), n))(jnp.arange(scores.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32)


def allowed_scores(scores, temperature, top_k, top_p):
    """Return float32 `scores` [B, V] over the temperature, -inf for tokens that may not be drawn.

    The settings are scalars or [B, 1]. Tokens that tie with the last kept one are kept too.
    """
    scores = scores / temperature
    ordered = jnp.sort(scores, axis=-1, descending=True)
    kept = jnp.arange(scores.shape[-1]) < top_k
    probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept &= (before < top_p) | (top_p >= 1)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= lowest, scores, -jnp.inf)
