"""Cross entropy through the output head, in chunks of positions: no [B, T, V] array exists, forward or backward.

Axis letters: B batch, T positions, C chunk of positions, D embed, V vocabulary.
"""

import jax
import jax.numpy as jnp

from easylm_mling.model import logits
from easylm_mling.sharding import constrain


def cross_entropy(
    hidden, head, targets, mask, chunk: int, z_loss: float = 0.0, soft_cap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Per-row sums over positions: (cross entropy [B], z-loss [B]), both float32, to be divided by counts by the caller.

    hidden [B, T, D]; head [V, D]; targets [B, T] int32; mask [B, T] float32. Logits are capped by `soft_cap` as in `logits`. `z_loss` times the squared
    log-normaliser (PaLM, section 5) keeps logits from drifting; it is kept apart so that losses stay comparable.
    Each chunk's logits are recomputed in the backward pass.
    """
    B, T, D = hidden.shape
    assert targets.shape == mask.shape == (B, T), (hidden.shape, targets.shape, mask.shape)
    chunk = min(chunk, T)
    padding = -T % chunk
    hidden, targets, mask = (
        jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets, mask)
    )
    # Whole along D before the loop, so that it is gathered once and not once a chunk.
    head = constrain(head.astype(hidden.dtype), "vocab", "activation_embed")

    def body(sums, part):
        h, t, m = part
        scores = constrain(logits(h, head, soft_cap), "batch", "position", "vocab")
        log_normaliser = jax.nn.logsumexp(scores, axis=-1)
        score = jnp.take_along_axis(scores, t[..., None], axis=-1)[..., 0]
        entropy = jnp.sum((log_normaliser - score) * m, axis=-1)
        z = z_loss * jnp.sum(jnp.square(log_normaliser) * m, axis=-1)
        return (sums[0] + entropy, sums[1] + z), None

    def split(x):
        return jnp.moveaxis(x.reshape(B, (T + padding) // chunk, chunk, *x.shape[2:]), 1, 0)

    zero = jnp.zeros((B,), jnp.float32)
    sums, _ = jax.lax.scan(jax.checkpoint(body), (zero, zero), (split(hidden), split(targets), split(mask)))
    return sums
