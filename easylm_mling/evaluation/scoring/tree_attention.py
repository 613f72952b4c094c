"""Attention in rows of trees: a token sees those on the way from its root, and no other branch.

A tree is laid out so that what grows from a token follows it without a gap. So one number of a token says who sees it: where
that ends. Axis letters as in model/attention.py.
"""

import jax.numpy as jnp
import numpy as np

from easylm_mling.model.attention import Keys, Queries, Segments, Window, masked_attention, sees

_NARROW, _CHUNKS = 256, 16  # queries of a chunk in narrow rows; chunks of a row in wide ones


def tree_attention(
    q: Queries, k: Keys, v: Keys, ends: Segments, positions: Segments, window: Window, soft_cap: float | None
) -> Queries:
    """Attend from each place to itself and to earlier ones whose `ends` lie behind it, at most `window - 1` positions back.

    Otherwise as `attention.attention`. Queries go in chunks, and a chunk is not compared with what comes after it.
    """
    T = q.shape[1]
    size, index = max(_NARROW, -(-T // _CHUNKS)), jnp.arange(T)
    out = []
    for start in range(0, T, size):
        here, before = slice(start, min(start + size, T)), slice(0, min(start + size, T))
        mask = sees(index[here, None], index[before], None) & (index[here, None] < ends[:, None, before])
        if window is not None:
            mask &= positions[:, here, None] - positions[:, None, before] < window
        out.append(masked_attention(q[:, here], k[:, before], v[:, before], mask, soft_cap))
    return jnp.concatenate(out, axis=1)


def branches(ends: np.ndarray) -> bool:
    """Return True if a sequence in `ends` [B, T] goes on in two ways."""
    inside = ends[:, :-1] > np.arange(1, ends.shape[1])  # the next token is seen from this one
    return bool(np.any(inside & (ends[:, :-1] != ends[:, 1:])))
