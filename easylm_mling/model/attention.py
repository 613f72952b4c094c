"""Causal attention within segments: one mask, and its forms for XLA and cuDNN.

Sources: google/gemma_pytorch `model.py` for the window (a position sees itself and `window - 1` before it) and for the
soft cap, which comes before the mask.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from easylm_mling.model.sharding import BATCH_AXES

QUERY_CHUNK = 512


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
) -> jax.Array:
    """Each position attends to itself and to earlier positions of its own segment, at most `window - 1` back.

    q [B, T, N, H]; k, v [B, T, K, H] (N a multiple of K); segment_ids [B, T] int32; window an int32 scalar, which may be
    traced (None: no limit). Scores x become soft_cap * tanh(x / soft_cap). Returns [B, T, N, H] in q's dtype. q must already
    carry the query scale. Scores and softmax are float32. Queries are taken in chunks of 512, each recomputed in the backward
    pass, so that no [B, N, T, T] array is ever held. The result has the checkpoint name "attention".
    """
    B, T, _, _ = q.shape
    assert k.shape == v.shape and k.shape[:2] == (B, T) == segment_ids.shape, (q.shape, k.shape, segment_ids.shape)
    index = jnp.arange(T)

    def chunk(q, query_segments, query_index):
        mask = (query_segments[:, :, None] == segment_ids[:, None, :]) & sees(query_index[:, None], index, window)
        return masked_attention(q, k, v, mask, soft_cap)

    if T <= QUERY_CHUNK or T % QUERY_CHUNK:
        return checkpoint_name(chunk(q, segment_ids, index), "attention")

    def split(x, axis):
        parts = jnp.reshape(x, (*x.shape[:axis], T // QUERY_CHUNK, QUERY_CHUNK, *x.shape[axis + 1 :]))
        return jnp.moveaxis(parts, axis, 0)

    out = jax.lax.map(jax.checkpoint(lambda args: chunk(*args)), (split(q, 1), split(segment_ids, 1), split(index, 0)))
    return checkpoint_name(jnp.moveaxis(out, 0, 1).reshape(q.shape), "attention")


def sees(query: jax.Array, key: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """Whether the position `query` attends to the position `key` (integers, broadcast): the one meaning of the mask."""
    causal = query >= key
    return causal if window is None else causal & (query - key < window)


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, soft_cap: float | None = None
) -> jax.Array:
    """Softmax attention where `mask` [B, T, S] is true. q [B, T, N, H]; k, v [B, S, K, H]; returns [B, T, N, H]."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = capped(scores, soft_cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def cudnn_attention(
    q, k, v, segment_ids, window, soft_cap: float | None, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """As `attention`, by the flash attention of NVIDIA's cuDNN, which knows no soft cap.

    The mask goes in as an array [B, 1, T, T], 2 bytes an element: cuDNN's own form for packed documents has a largest
    number of them. `implementation`: `xla` is the same call without a GPU.
    """
    assert soft_cap is None

    def run(q, k, v, segment_ids):
        index = jnp.arange(q.shape[1])
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & sees(index[:, None], index, window)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=1.0, is_causal=True, implementation=implementation
        )

    return checkpoint_name(on_each_device(run, q, k, v, segment_ids), "attention")


def on_each_device(run: Callable, q, k, v, segment_ids) -> jax.Array:
    """`run(q, k, v, segment_ids)` with what each device of the mesh holds: rows lie along data and fsdp, heads along tensor."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q, k, v, segment_ids)
    shards, heads = mesh.shape["tensor"], k.shape[2]
    if heads < shards:
        # Every shard of the queries takes the one key/value head that is its own.
        k, v = (jnp.repeat(x, shards // heads, axis=2) for x in (k, v))
    by_head, by_row = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES, None)
    specs = (by_head, by_head, by_head, by_row)
    return jax.shard_map(run, in_specs=specs, out_specs=by_head, check_vma=False)(q, k, v, segment_ids)


def capped(x: jax.Array, soft_cap: float | None) -> jax.Array:
    """x squeezed smoothly into (-soft_cap, soft_cap); unchanged when there is no cap."""
    return x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap)
