"""Batched decoding in rows that come and go: a text may begin while others are being written.

Axis letters: B rows, P prompt slots, S cache slots, N new tokens, M most likely tokens, V vocabulary.

A row's result depends on nothing but its own request: a token is drawn with the key of (the request's seed, its number),
and all rows run the same program whatever the others hold.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easylm_mling.config import ModelConfig
from easylm_mling.errors import check
from easylm_mling.inference.generate import SLOTS, allowed_scores, decode, on_host, prefill
from easylm_mling.model.attention import QUERY_CHUNK
from easylm_mling.model.decoder import logits
from easylm_mling.model.precision import products_in

MOST_TOPS = 20  # alternatives to a token
_AT_ONCE = 8  # tokens that a row gains in one call


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn: `temperature` 0 takes the likeliest. Otherwise as `generate`'s settings."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0


class Tokens(NamedTuple):
    """What each row gained: `ids` int32 and `logprobs` float32 [B, N]; of the M likeliest the same [B, N, M].

    Log-probabilities are the model's, in nats, before temperature and what it leaves out.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class Decoder:
    """A model that writes up to `rows` texts at once, each of at most `length` tokens with its prompt.

    `params` are float32. Not for several threads.
    """

    def __init__(
        self, graph: nnx.GraphDef, params: dict, model: ModelConfig, rows: int, length: int, dtype: str = "bfloat16"
    ):
        check(rows > 0, f"rows={rows} must be positive")
        check(
            1 < length <= model.max_position_embeddings,
            f"length={length}: the model reads 2 to {model.max_position_embeddings} tokens",
        )
        self.model, self.rows, self.length = model, rows, length
        unit = SLOTS if length <= QUERY_CHUNK else QUERY_CHUNK
        self._slots = -(-length // unit) * unit
        self._params, self._dtype = params, dtype
        self._static = {"graph": graph, "dtype": jnp.dtype(dtype)}
        with products_in(dtype):
            self._state = _empty(params, rows=rows, slots=self._slots, **self._static)
        self._draws = [Draw()] * rows
        self._counts = np.zeros(rows, np.int32)

    def begin(self, row: int, prompt: list[int], draw: Draw):
        """Read a prompt, with its BOS, into a row: what was there is gone. Raises ConfigError for one that does not fit."""
        check(
            0 < len(prompt) < self.length,
            f"a prompt of {len(prompt)} tokens; the window has room for {self.length - 1}",
        )
        check(all(0 <= i < self.model.vocab_size for i in prompt), "the prompt holds a token outside the vocabulary")
        tokens = np.zeros((1, self._bucket(len(prompt))), np.int32)
        tokens[0, : len(prompt)] = prompt
        with products_in(self._dtype):
            self._state = _begin(
                self._params,
                self._state,
                tokens,
                np.int32(row),
                np.int32(len(prompt)),
                slots=self._slots,
                **self._static,
            )
        self._draws[row], self._counts[row] = draw, 0

    def advance(self, tops: bool = False) -> Tokens:
        """Write the next tokens of every row; the caller leaves out what lies behind a row's end. `tops`: M is not 0."""
        draws, model = self._draws, self.model
        settings = (
            np.array([[d.temperature or 1.0] for d in draws], np.float32),
            np.array([[d.top_k or model.vocab_size] for d in draws], np.int32),
            np.array([[d.top_p] for d in draws], np.float32),
        )
        seeds = np.array([d.seed & 0xFFFFFFFF for d in draws], np.uint32)
        greedy = np.array([d.temperature == 0 for d in draws])
        with products_in(self._dtype):
            self._state, out = _advance(
                self._params, self._state, seeds, self._counts, greedy, settings,
                draws=not greedy.all(), tops=min(MOST_TOPS, model.vocab_size) if tops else 0, **self._static,
            )  # fmt: skip
        self._counts = self._counts + _AT_ONCE
        return Tokens(*(np.moveaxis(on_host(x), 0, 1) for x in out))

    def score(self, prompts: list[list[int]], tops: int = 1) -> Tokens:
        """Return, for each place of each prompt, what the model predicts there: N is that of the longest prompt.

        `ids` are the prompt's *next* tokens, and at a prompt's last place the likeliest one, which greedy decoding writes.
        """
        size = self._bucket(max(map(len, prompts)))
        tokens = np.zeros((1 << (len(prompts) - 1).bit_length(), size), np.int32)
        following = np.full(tokens.shape, -1, np.int32)
        for i, prompt in enumerate(prompts):
            check(
                0 < len(prompt) <= self.length,
                f"a prompt of {len(prompt)} tokens; the window has room for {self.length}",
            )
            check(
                all(0 <= t < self.model.vocab_size for t in prompt), "the prompt holds a token outside the vocabulary"
            )
            tokens[i, : len(prompt)] = prompt
            following[i, : len(prompt) - 1] = prompt[1:]
        tops = min(max(1, tops), self.model.vocab_size)
        with products_in(self._dtype):
            out = _score(self._params, tokens, following, tops=tops, **self._static)
        return Tokens(*(on_host(x)[: len(prompts)] for x in out))

    def _bucket(self, tokens: int) -> int:
        """Return the slots that a prompt is padded to: few sizes, as each is compiled once."""
        unit = SLOTS if tokens <= QUERY_CHUNK else QUERY_CHUNK
        return min(self._slots, max(unit, 1 << (tokens - 1).bit_length()))


@partial(jax.jit, static_argnames=("graph", "rows", "slots", "dtype"))
def _empty(params, *, graph, rows: int, slots: int, dtype):
    """Return the state of rows without text: hidden states [B, D], caches of S slots, and positions [B]."""
    tokens, lengths = jnp.zeros((rows, SLOTS), jnp.int32), jnp.ones(rows, jnp.int32)
    shapes = jax.eval_shape(lambda p: prefill(nnx.merge(graph, p), tokens, lengths, slots - SLOTS, dtype), params)
    hidden, caches = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return hidden[:, 0], caches, lengths


@partial(jax.jit, static_argnames=("graph", "slots", "dtype"), donate_argnames="state")
def _begin(params, state, tokens, row, length, *, graph, slots: int, dtype):
    """Return the state with the prompt `tokens` [1, P] of `length` in `row`."""
    hidden, caches, positions = state
    new, own = prefill(nnx.merge(graph, params), tokens, length[None], slots - tokens.shape[1], dtype)
    hidden = hidden.at[row].set(new[0, length - 1])
    # Leaves are [periods, B, S, K, H].
    caches = jax.tree.map(lambda all_, one: all_.at[:, row].set(one[:, 0]), caches, own)
    return hidden, caches, positions.at[row].set(length)


@partial(jax.jit, static_argnames=("graph", "draws", "tops", "dtype"), donate_argnames="state")
def _advance(params, state, seeds, counts, greedy, settings, *, graph, draws: bool, tops: int, dtype):
    """Return the state after N more tokens, and what Tokens holds, with N before B."""
    model = nnx.merge(graph, params)

    def one(carry, n):
        hidden, caches, positions = carry
        scores = logits(hidden, model.head, model.config.final_logit_softcapping)
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        if draws:
            keys = jax.vmap(lambda s, c: jax.random.fold_in(jax.random.key(s), c))(seeds, counts + n)
            drawn = jax.vmap(jax.random.categorical)(keys, allowed_scores(scores, *settings))
            token = jnp.where(greedy, token, drawn.astype(jnp.int32))
        told = _tell(scores, token, tops)
        hidden, caches = decode(model, token, positions, caches, dtype)
        return (hidden, caches, positions + 1), (token, *told)

    return jax.lax.scan(one, state, jnp.arange(_AT_ONCE))


@partial(jax.jit, static_argnames=("graph", "tops", "dtype"))
def _score(params, tokens, following, *, graph, tops: int, dtype):
    """Return what Tokens holds of `tokens` [B, P], whose next ones are `following` [B, P]; -1: the likeliest."""
    model = nnx.merge(graph, params)
    lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    hidden, _ = prefill(model, tokens, lengths, 0, dtype)
    hidden = hidden.reshape(tokens.shape[0], -1, SLOTS, hidden.shape[-1])

    def part(args):
        h, wanted = args  # [B, SLOTS, D], [B, SLOTS]
        scores = logits(h, model.head, model.config.final_logit_softcapping)
        token = jnp.where(wanted < 0, jnp.argmax(scores, axis=-1).astype(jnp.int32), wanted)
        return (token, *_tell(scores, token, tops))

    parts = jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(following.reshape(tokens.shape[0], -1, SLOTS), 1, 0)
    out = jax.lax.map(part, parts)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(tokens.shape[0], -1, *x.shape[3:]) for x in out)


def _tell(scores, token, tops: int):
    """Return the log-probabilities of `token` [...] and of the M likeliest, from `scores` [..., V]."""
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    own = jnp.take_along_axis(scores, token[..., None], axis=-1) - total
    best, ids = jax.lax.top_k(scores, tops) if tops else (scores[..., :0], jnp.zeros((*token.shape, 0), jnp.int32))
    return own[..., 0], ids, best - total
