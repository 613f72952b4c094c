"""The spike guard: steps that are not finite, or whose loss or gradient norm is a spike, change nothing.

A spike is a loss or gradient norm over `sigmas` standard deviations above the mean of the last WINDOW steps: 6 and 128 in
OLMo-core (`SkipStepOptimizer`) and levanter, where as in MaxText it must be asked for. (PaLM's authors went back and left
batches out by hand, arXiv:2204.02311, 5.1: run/rewind.py.) Theirs takes everything into its window, so that one NaN blinds it
or freezes the run for the next 128 steps. Here what is not finite never enters, and a spike enters as the limit that it
passed, so it cannot hide the next one. Each further spike in a row doubles the sigmas, so a lasting level (of another data
stage, say) is accepted within a few steps, and a loss that runs away is not.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

WINDOW = 128
# The verdict on a step.
ACCEPTED, NOT_FINITE, SPIKE = range(3)


class Recent(NamedTuple):
    """The window of the last finite steps; or, in the same places, shapes or shardings."""

    values: Any  # float32 [2, WINDOW], a ring: the loss (nats a target) and the gradient norm
    count: Any  # int32: how many have ever entered
    in_a_row: Any  # int32: spikes since the last accepted step


def nothing_recent() -> Recent:
    """The window of a run that has done no step."""
    return Recent(jnp.zeros((2, WINDOW), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    recent: Recent, loss: Float[Array, ""], norm: Float[Array, ""], sigmas: float
) -> tuple[Int32[Array, ""], Float32[Array, "2"], Recent]:
    """(ACCEPTED, NOT_FINITE or SPIKE; the limits of loss and norm; the window with this step in it).

    There are no spikes with `sigmas` 0, nor before the window is half full: the start of a run would mislead it.
    """
    now = jnp.stack([loss, norm]).astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(now))
    limits = jnp.full((2,), jnp.inf, jnp.float32)
    if sigmas:
        entered = jnp.minimum(recent.count, WINDOW)
        there, size = jnp.arange(WINDOW) < entered, jnp.maximum(entered, 1)
        mean = jnp.sum(jnp.where(there, recent.values, 0), axis=1) / size
        square = jnp.where(there, recent.values - mean[:, None], 0) ** 2
        allowed = sigmas * jnp.exp2(jnp.minimum(recent.in_a_row, 30).astype(jnp.float32))
        limits = jnp.where(entered < WINDOW // 2, limits, mean + allowed * jnp.sqrt(jnp.sum(square, axis=1) / size))
    verdict = jnp.where(finite, jnp.where(jnp.any(now > limits), SPIKE, ACCEPTED), NOT_FINITE)
    entering = jnp.where(jnp.arange(WINDOW) == recent.count % WINDOW, jnp.minimum(now, limits)[:, None], recent.values)
    in_a_row = jnp.where(verdict == ACCEPTED, 0, recent.in_a_row + (verdict == SPIKE))
    return verdict, limits, Recent(jnp.where(finite, entering, recent.values), recent.count + finite, in_a_row)
