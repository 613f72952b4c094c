"""Causal attention within segments: one mask, and its forms for XLA and cuDNN.

Source: google/gemma_pytorch `model.py`. A window shows a position itself and `window - 1` before it, and scores are
soft-capped before they are masked.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from easylm_mling.model.sharding import BATCH_AXES

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]
Segments = Int32[Array, "B T"]
# Of more positions than the queries have.
WideKeys = Float[Array, "B S K H"]
WideSegments = Int32[Array, "B S"]
Window = int | None  # positions; None: no limit
QUERY_CHUNK = 512


def attention(q: Queries, k: Keys, v: Keys, segment_ids: Segments, window: Window, soft_cap: float | None) -> Queries:
    """Attend from each position to itself and to earlier ones of its segment, at most `window - 1` back.

    N is a multiple of K, and q carries the query scale already. Scores x become soft_cap * tanh(x / soft_cap). Scores and
    softmax are float32, and the result has q's dtype. Queries go in chunks of 512, which the backward pass recomputes, so
    that no [B, N, T, T] array exists. The result has the checkpoint name "attention".
    """
    B, T, _, _ = q.shape
    assert k.shape == v.shape and k.shape[:2] == (B, T) == segment_ids.shape, (q.shape, k.shape, segment_ids.shape)
    index = jnp.arange(T)
    return _attend(q, k, v, (segment_ids, index), (segment_ids, index), window, soft_cap)


def attend_from(
    q: Queries,
    k: WideKeys,
    v: WideKeys,
    query_segments: Segments,
    segment_ids: WideSegments,
    query_index: Int[Array, "T"],
    window: Window,
    soft_cap: float | None,
) -> Queries:
    """Compute `attention` of queries at the positions `query_index`, of the S positions of the keys."""
    return _attend(q, k, v, (query_segments, query_index), (segment_ids, jnp.arange(k.shape[1])), window, soft_cap)


def _attend(q, k, v, of_queries, of_keys, window, soft_cap):
    """Attend from queries to keys by their (segment ids, positions)."""
    T = q.shape[1]
    segment_ids, index = of_keys

    def chunk(q, query_segments, query_index):
        mask = (query_segments[:, :, None] == segment_ids[:, None, :]) & sees(query_index[:, None], index, window)
        return masked_attention(q, k, v, mask, soft_cap)

    if T <= QUERY_CHUNK or T % QUERY_CHUNK:
        return checkpoint_name(chunk(q, *of_queries), "attention")

    def split(x, axis):
        parts = jnp.reshape(x, (*x.shape[:axis], T // QUERY_CHUNK, QUERY_CHUNK, *x.shape[axis + 1 :]))
        return jnp.moveaxis(parts, axis, 0)

    out = jax.lax.map(
        jax.checkpoint(lambda args: chunk(*args)), (split(q, 1), split(of_queries[0], 1), split(of_queries[1], 0))
    )
    return checkpoint_name(jnp.moveaxis(out, 0, 1).reshape(q.shape), "attention")


def sees(query: Int[Array, "..."], key: Int[Array, "..."], window: Window) -> Bool[Array, "..."]:
    """Return True where the position `query` attends to the position `key`; the two broadcast."""
    causal = query >= key
    return causal if window is None else causal & (query - key < window)


def masked_attention(
    q: Queries,
    k: WideKeys,
    v: WideKeys,
    mask: Bool[Array, "B T S"],
    soft_cap: float | None,
) -> Queries:
    """Attend where `mask` is true. Scores and softmax are float32, and the result has v's dtype."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = capped(scores, soft_cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def cudnn_attention(
    q: Queries, k: Keys, v: Keys, segment_ids: Segments, window: Window, soft_cap: None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Queries:  # fmt: skip
    """Compute `attention` with the flash attention of NVIDIA's cuDNN, which has no soft cap.

    The mask is an array [B, 1, T, T] of 2 bytes an element, for cuDNN's own form of packing limits the number of documents.
    `implementation="xla"` is the same call without a GPU.
    """
    assert soft_cap is None

    def run(q, k, v, segment_ids):
        index = jnp.arange(q.shape[1])
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & sees(index[:, None], index, window)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=1.0, is_causal=True, implementation=implementation
        )

    return checkpoint_name(on_each_device(run, q, k, v, segment_ids), "attention")


def cudnn_widest_head(compute_capability: str) -> int:
    """Return the widest head_dim of cuDNN's flash attention on a GPU: twice as wide from Hopper (9.0) on."""
    return 256 if float(compute_capability) >= 9.0 else 128


def on_each_device(run: Callable, q: Queries, k: Keys, v: Keys, segment_ids: Segments) -> Queries:
    """Call `run(q, k, v, segment_ids)` on each device of the mesh with its own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q, k, v, segment_ids)
    shards, heads = mesh.shape["tensor"], k.shape[2]
    if heads < shards:
        # Every shard of the query heads takes the one key/value head that they belong to.
        k, v = (jnp.repeat(x, shards // heads, axis=2) for x in (k, v))
    by_head, by_row = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES, None)
    specs = (by_head, by_head, by_head, by_row)
    return jax.shard_map(run, in_specs=specs, out_specs=by_head, check_vma=False)(q, k, v, segment_ids)


def capped(x: Float[Array, "*shape"], soft_cap: float | None) -> Float[Array, "*shape"]:
    """Squeeze x smoothly into (-soft_cap, soft_cap); without a cap it is returned as it is."""
    return x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap)
