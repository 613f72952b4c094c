"""The running average of the parameters (`train.ema`): one float32 copy beside them, updated at every step.

With `decay` it is exponential (Polyak and Juditsky 1992); without, the plain mean of the parameters after step `from_step` and
after each later one. A mean over a window that moves would need every set of parameters in it: `export-hf --average K` takes
those from the checkpoints.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from easylm_mling.config import EmaConfig


def averaged(average: dict, params: dict, step: Int32[Array, ""], ema: EmaConfig) -> dict:
    """The average after `step` (counted from 1), float32, of the one before it and the parameters after it.

    A step that changed nothing counts with the parameters that it left.
    """
    behind = jnp.maximum(step - ema.from_step, 0)
    share = 1.0 / (behind + 1).astype(jnp.float32) if ema.decay is None else jnp.float32(1.0 - ema.decay)
    return jax.tree.map(lambda a, p: jnp.where(behind == 0, p, a + share * (p - a)), average, params)
