"""Attention by JAX's splash kernel for TPU: same result as model/attention.py, and no scores in HBM.

Source: jax.experimental.pallas.ops.tpu.splash_attention, which follows FlashAttention-2 (Dao 2023).

Axis letters as in model/attention.py.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Int32

from easylm_mling.model.attention import Keys, Queries, Segments, WideKeys, WideSegments, on_each_device
from easylm_mling.model.sequence_shares import share_order

_LANES = 128  # of the kernel's tiles
# Keys whose scores are computed at a time: 1024 overflow the vector memory of v4, v5p and v5e at head_dim 256.
_COMPUTED_KEYS = 512


def runs_on(positions: int, head_dim: int) -> bool:
    """Return True if the kernel takes sequences and heads of these sizes."""
    return positions % _LANES == 0 and head_dim % _LANES == 0


def splash_attention(
    q: Queries, k: Keys, v: Keys, segment_ids: Segments, window: int | None, soft_cap: float | None,
    block: int, interpret: bool = False,
) -> Queries:  # fmt: skip
    """Compute `attention.attention` in tiles of `block` queries by `block` keys; blocks outside the window are skipped.

    `interpret` runs the kernel without a TPU, slowly.
    """

    def run(q, k, v, segment_ids):
        kernel = _kernel(q.shape[1], q.shape[2] // k.shape[2], window, soft_cap, min(block, q.shape[1]), interpret)
        return _by_heads(kernel, q, k, v, segment_ids, segment_ids)

    return on_each_device(run, q, k, v, segment_ids)


def splash_from(
    q: Queries, k: WideKeys, v: WideKeys, query_segments: Segments, segment_ids: WideSegments,
    share: Int32[Array, ""] | None, window: int | None, soft_cap: float | None,
    count: int, block: int, interpret: bool = False,
) -> Queries:  # fmt: skip
    """Compute the attention of one device, as model/sequence_shares.py asks for it: of `share`, one of `count`, or without.

    The queries of a share see all S positions of their row. Without one they are at the last T of them.
    """
    T, S = q.shape[1], k.shape[1]
    block = min(block, T if share is None else T // 2)
    shares, before = (1, S - T) if share is None else (count, 0)
    kernel = _kernel(T * shares, q.shape[2] // k.shape[2], window, soft_cap, block, interpret, before, shares)
    if share is not None:
        kernel = jax.tree.map(lambda table: _part(table, share, count), kernel)
    return _by_heads(kernel, q, k, v, query_segments, segment_ids)


def _part(table: jax.Array, share: jax.Array, count: int) -> jax.Array:
    """Return what a share has of a kernel's table: of [1, blocks, blocks] the second axis, of the queries' positions the only one."""
    axis = 1 if table.ndim == 3 else 0
    size = table.shape[axis] // count
    return jax.lax.dynamic_slice_in_dim(table, share * size, size, axis)


def _by_heads(kernel, q, k, v, query_segments, segment_ids):
    B, T, N, H = q.shape
    K = k.shape[2]
    q = jnp.transpose(q.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4))
    k, v = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k, v))
    segments = splash.SegmentIds(query_segments, segment_ids)
    # Mapped over key/value heads: in the backward pass only a mapped axis of the grid is split over the two cores of a v4
    # or v5p chip.
    over_heads = jax.vmap(kernel, (0, 0, 0, None))
    out: Any = jax.vmap(over_heads)(q, k, v, segments)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


class _ByDistance:
    """A mask that shows a block as one row: an element for each distance of a query from a key, on which alone it depends.

    The positions of the queries, `q_sequence`, follow one another within a block.

    The kernel's tables only ask whether all or any of a block is seen. JAX's own masks compute every pair for that, which
    takes minutes for texts of 131,072 tokens.
    """

    mask_function: Any
    q_sequence: np.ndarray

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        first = int(self.q_sequence[queries.start])
        last = first + queries.stop - queries.start
        distances = np.arange(first - keys.stop + 1, last - keys.start, dtype=np.int32)
        return self.mask_function(distances[None, :], np.zeros((1, 1), np.int32))


class _Causal(_ByDistance, masks.CausalMask):
    pass


class _Local(_ByDistance, masks.LocalMask):
    pass


@lru_cache
def _kernel(
    T: int, G: int, window: int | None, soft_cap: float | None, block: int, interpret: bool, before: int = 0,
    shares: int = 1,
):  # fmt: skip
    """Make the kernel from G query heads [G, T, H] to one key/value head [before + T, H].

    Its tables are those of all `shares` of a row, one after another.
    """
    while T // (2 * shares if shares > 1 else 1) % block:  # tiles must cover chunks exactly
        block //= 2
    S = before + T
    mask = _Causal((T, S), before) if window is None else _Local((T, S), (window - 1, 0), before)
    if shares > 1:
        mask.q_sequence = share_order(T, shares).reshape(-1).astype(np.int32)
    part = min(block, _COMPUTED_KEYS)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=part, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=part, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    # Its tables as constants: a kernel that is cached must not hold values of the trace that made it.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mqa(
            masks.MultiHeadMask([mask] * G),
            head_shards=1,
            q_seq_shards=shares,
            block_sizes=sizes,
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
