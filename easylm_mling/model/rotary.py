"""Rotary embeddings: the frequencies, their scaling for longer texts, and the rotation of queries and keys.

Axis letters: B batch, T positions, H head_dim. Source: transformers `modeling_rope_utils.py`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from easylm_mling.config import RopeScaling

Ids = Int32[Array, "B T"]


def rotary_frequencies(theta: float, head_dim: int) -> Float32[Array, "{head_dim//2}"]:
    """Compute theta ** (-2i / H) radians a position, for i from 0."""
    half = head_dim // 2
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def scaled_frequencies(
    frequencies: Float32[Array, "half"], scaling: RopeScaling | None, theta: float
) -> Float32[Array, "half"]:
    """Scale rotary frequencies for longer texts. Source: transformers `modeling_rope_utils.py`.

    `theta` is the base that the frequencies come from.
    """
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "proportional":
        rotated = int(scaling.partial_rotary_factor * 2 * frequencies.shape[0] // 2)
        return jnp.where(jnp.arange(frequencies.shape[0]) < rotated, frequencies / scaling.factor, 0.0)
    if scaling.rope_type == "yarn":
        low, high = _yarn_bounds(scaling, theta, frequencies.shape[0])
        kept = 1.0 - jnp.clip((jnp.arange(frequencies.shape[0], dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
        return frequencies / scaling.factor * (1.0 - kept) + frequencies * kept
    waves = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((waves - low) / (high - low), 0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)


def _yarn_bounds(scaling: RopeScaling, theta: float, half: int) -> tuple[float, float]:
    """Return the index of the last frequency that yarn leaves whole, and of the first that it divides by the whole factor."""

    def index(waves: float) -> float:
        length = scaling.original_max_position_embeddings
        return 2 * half * math.log(length / (waves * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    # The bound is that of transformers: the width of a head, not half of it.
    low, high = max(low, 0.0), min(high, 2.0 * half - 1.0)
    return low, high + 0.001 if low == high else high


def rotary(
    x: Float[Array, "B T heads H"], positions: Ids, frequencies: Float32[Array, "H//2"], scale: float = 1.0
) -> Float[Array, "B T heads H"]:
    """Half-split rotary embedding of x, times `scale`, in x's dtype.

    Angles are float32: in bfloat16 positions would be wrong from 257 on.
    """
    return _rotate(scale, scale, x, positions, frequencies)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(of_cos, of_sin, x, positions, frequencies):
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.concatenate([frequencies, frequencies])
    # The other half of each pair, signed. A product with ones and minus ones is exact, and one pass over x on a TPU; a
    # concatenation would be three.
    half = x.shape[-1] // 2
    swap = np.roll(np.eye(x.shape[-1]), half, axis=1) * np.repeat([[1.0], [-1.0]], half, axis=0)
    other = jnp.einsum("btnh,hi->btni", x, jnp.asarray(swap, x.dtype), precision=jax.lax.Precision.HIGHEST)
    wide, other = x.astype(jnp.float32), other.astype(jnp.float32)
    return (wide * (jnp.cos(angles) * of_cos) + other * (jnp.sin(angles) * of_sin)).astype(x.dtype)


def _forward(of_cos, of_sin, x, positions, frequencies):
    return _rotate(of_cos, of_sin, x, positions, frequencies), (positions, frequencies)


def _backward(of_cos, of_sin, residuals, grad_out):
    # The transpose of a rotation turns back. JAX's own would round each term before it rounds their sum.
    return _rotate(of_cos, -of_sin, grad_out, *residuals), None, None


_rotate.defvjp(_forward, _backward)
