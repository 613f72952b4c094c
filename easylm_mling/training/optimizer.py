"""AdamW with float32 moments, its schedule, and the mask that keeps weight decay off some parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, PyTree

from easylm_mling.config import LoraConfig, ModelConfig, OptimizerConfig, StepTokens
from easylm_mling.model.params import parameter_table, to_nested


def make_schedule(o: OptimizerConfig, total_steps: int, tokens: StepTokens) -> optax.Schedule:
    """step -> learning rate. The first update has step 0; lengths in tokens are whole steps, as every step is full.

    Where the batch size has changed, the way from the end of the warm-up to that of the budget is measured in tokens, so
    that the rate does not jump there. The warm-up is measured in steps: in tokens, it ends with the step that has them.
    """
    warmup = min(o.warmup.amount if o.warmup.unit == "steps" else tokens.step_of(o.warmup.amount), total_steps)
    floor = o.learning_rate * o.final_fraction
    # In steps of the present size; optax takes fractions, too, and does not say so in its types.
    length: Any = total_steps - warmup if not tokens.earlier else _span(tokens, warmup, total_steps)
    if o.schedule == "cosine":
        main = optax.cosine_decay_schedule(o.learning_rate, max(1, length), alpha=o.final_fraction)
    else:
        decay = o.decay.to_steps(tokens.per_step)
        main = optax.linear_schedule(o.learning_rate, floor, max(1, decay), transition_begin=max(0, length - decay))
    # Step 0 of the warm-up already learns: (step + 1) / warmup of the peak.
    rise = optax.linear_schedule(o.learning_rate / max(1, warmup), o.learning_rate, max(1, warmup - 1))
    if tokens.earlier:
        return optax.join_schedules([rise, lambda count: main(_steps_since(tokens, warmup, count))], [warmup])
    return optax.join_schedules([rise, main], [warmup])


def _span(tokens: StepTokens, first: int, last: int) -> float:
    """Return the tokens between two steps, in steps of the present size."""
    return (tokens.at(last) - tokens.at(first)) / tokens.per_step


def _steps_since(tokens: StepTokens, first: int, count: ArrayLike) -> Float32[Array, ""]:
    """Return the tokens of the `count` steps after step `first`, in steps of the present size."""
    step = jnp.asarray(count, jnp.float32) + first
    since = jnp.zeros_like(step)
    for start, _, size in tokens.pieces():
        # Differences are small, so float32 keeps them exact; tokens since the run began, it would not.
        begin = max(start, first)
        passed = _span(tokens, first, begin) + (step - begin) * (size / tokens.per_step)
        since = jnp.where(step >= begin, passed, since)
    return since


def make_optimizer(o: OptimizerConfig, m: ModelConfig, lora: LoraConfig | None = None) -> optax.GradientTransformation:
    """The direction of an AdamW update, before the learning rate (Loshchilov and Hutter 2019, decoupled decay).

    Of adapters both factors are decayed, as in PEFT with AdamW.
    """
    return optax.chain(
        optax.scale_by_adam(o.beta1, o.beta2, o.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(o.weight_decay, mask=None if lora else decay_mask(o, m)),
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
