"""AdamW with float32 moments, its schedule, and the mask that keeps weight decay off some parameters."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, PyTree

from easylm_mling.config import ModelConfig, OptimizerConfig
from easylm_mling.model.params import parameter_table, to_nested


def make_schedule(o: OptimizerConfig, total_steps: int, tokens_per_step: int) -> optax.Schedule:
    """step -> learning rate. The first update has step 0; lengths in tokens are whole steps, as every step is full."""
    warmup = min(o.warmup.to_steps(tokens_per_step), total_steps)
    floor = o.learning_rate * o.final_fraction
    if o.schedule == "cosine":
        main = optax.cosine_decay_schedule(o.learning_rate, max(1, total_steps - warmup), alpha=o.final_fraction)
    else:
        decay = o.decay.to_steps(tokens_per_step)
        main = optax.linear_schedule(
            o.learning_rate, floor, max(1, decay), transition_begin=max(0, total_steps - warmup - decay)
        )
    # Step 0 of the warm-up already learns: (step + 1) / warmup of the peak.
    rise = optax.linear_schedule(o.learning_rate / max(1, warmup), o.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([rise, main], [warmup])


def make_optimizer(o: OptimizerConfig, m: ModelConfig) -> optax.GradientTransformation:
    """The direction of an AdamW update, before the learning rate (Loshchilov and Hutter 2019, decoupled decay)."""
    return optax.chain(
        optax.scale_by_adam(o.beta1, o.beta2, o.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(o.weight_decay, mask=decay_mask(o, m)),
    )


def decay_mask(o: OptimizerConfig, m: ModelConfig) -> dict:
    """True for each parameter that weight decay shrinks: kernels always, norms never, the embedding by choice."""
    decayed = {"kernel"} | ({"embedding"} if o.decay_embedding else set())
    return to_nested({p.path: p.kind in decayed for p in parameter_table(m)})


def clip_by_global_norm(
    gradients: PyTree[Float[Array, "..."]], limit: float
) -> tuple[PyTree[Float[Array, "..."]], Float32[Array, ""]]:
    """Gradients scaled to a global norm of at most `limit`, and the norm before."""
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, limit / norm)
    return jax.tree.map(lambda g: g * scale, gradients), norm
