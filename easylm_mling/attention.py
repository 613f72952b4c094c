"""Causal attention among positions of one segment, behind one function with one meaning of the mask.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head_dim.
"""

import jax
import jax.numpy as jnp

QUERY_CHUNK = 512


def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Each position attends to itself and to earlier positions of its own segment.

    q [B, T, N, H]; k, v [B, T, K, H] (N a multiple of K); segment_ids [B, T] int32. Returns [B, T, N, H] in q's dtype.
    q must already carry the query scale. Scores and softmax are float32. Queries are taken in chunks of 512, each
    recomputed in the backward pass, so that no [B, N, T, T] array is ever held.
    """
    B, T, _, _ = q.shape
    assert k.shape == v.shape and k.shape[:2] == (B, T) == segment_ids.shape, (q.shape, k.shape, segment_ids.shape)
    index = jnp.arange(T)

    def chunk(q, query_segments, query_index):
        mask = (query_segments[:, :, None] == segment_ids[:, None, :]) & (query_index[:, None] >= index)
        return masked_attention(q, k, v, mask)

    if T <= QUERY_CHUNK or T % QUERY_CHUNK:
        return chunk(q, segment_ids, index)

    def split(x, axis):
        parts = jnp.reshape(x, (*x.shape[:axis], T // QUERY_CHUNK, QUERY_CHUNK, *x.shape[axis + 1 :]))
        return jnp.moveaxis(parts, axis, 0)

    out = jax.lax.map(jax.checkpoint(lambda args: chunk(*args)), (split(q, 1), split(segment_ids, 1), split(index, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention where `mask` [B, T, S] is true. q [B, T, N, H]; k, v [B, S, K, H]; returns [B, T, N, H]."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)
