"""Attention by JAX's splash kernel for TPU: same result as model/attention.py, and no scores in HBM.

Source: jax.experimental.pallas.ops.tpu.splash_attention, which follows FlashAttention-2 (Dao 2023).

Axis letters as in model/attention.py.
"""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from easylm_mling.model.attention import Keys, Queries, Segments, on_each_device

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
    run = partial(_by_heads, window=window, soft_cap=soft_cap, block=min(block, q.shape[1]), interpret=interpret)
    return on_each_device(run, q, k, v, segment_ids)


def _by_heads(q, k, v, segment_ids, window, soft_cap, block, interpret):
    B, T, N, H = q.shape
    K = k.shape[2]
    kernel = _kernel(T, N // K, window, soft_cap, block, interpret)
    q = jnp.transpose(q.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4))
    k, v = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k, v))
    segments = splash.SegmentIds(segment_ids, segment_ids)
    # Mapped over key/value heads: in the backward pass only a mapped axis of the grid is split over the two cores of a v4
    # or v5p chip.
    over_heads = jax.vmap(kernel, (0, 0, 0, None))
    out: Any = jax.vmap(over_heads)(q, k, v, segments)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


class _ByDistance:
    """A mask that shows a block as one row: an element for each distance of a query from a key, on which alone it depends.

    The kernel's tables only ask whether all or any of a block is seen. JAX's own masks compute every pair for that, which
    takes minutes for texts of 131,072 tokens.
    """

    mask_function: Any

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        distances = np.arange(queries.start - keys.stop + 1, queries.stop - keys.start, dtype=np.int32)
        return self.mask_function(distances[None, :], np.zeros((1, 1), np.int32))


class _Causal(_ByDistance, masks.CausalMask):
    pass


class _Local(_ByDistance, masks.LocalMask):
    pass


@lru_cache
def _kernel(T: int, G: int, window: int | None, soft_cap: float | None, block: int, interpret: bool):
    """Make the kernel from G query heads [G, T, H] to one key/value head [T, H]."""
    while T % block:  # tiles must cover T exactly
        block //= 2
    mask = _Causal((T, T)) if window is None else _Local((T, T), (window - 1, 0), 0)
    part = min(block, _COMPUTED_KEYS)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=part, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=part, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    # Its tables as constants: a kernel that is cached must not hold values of the trace that made it.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mqa_single_device(
            masks.MultiHeadMask([mask] * G),
            block_sizes=sizes,
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
