"""Products of activations with weights, whose weights' gradients may be wider than the activations.

In a product's own dtype, each device rounds its part of a weight's gradient before the parts are summed, and so does every
sum on the way. In float32 nothing is rounded, for twice the bytes between devices.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def project(spec: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute `einsum(spec, x, weight)` in x's dtype; the weight's gradient is summed over devices in the weight's dtype."""
    return jnp.einsum(spec, x, weight) if weight.dtype == x.dtype else _project(spec, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(spec, x, weight):
    return jnp.einsum(spec, x, weight.astype(x.dtype))


def _forward(spec, x, weight):
    return _project(spec, x, weight), (x, weight)


def _backward(spec, residuals, grad_out):
    x, weight = residuals
    inputs, out = spec.split("->")
    of_x, of_weight = inputs.split(",")
    grad_x = jnp.einsum(f"{out},{of_weight}->{of_x}", grad_out, weight.astype(x.dtype))
    return grad_x, jnp.einsum(f"{of_x},{out}->{of_weight}", x, grad_out, preferred_element_type=weight.dtype)


_project.defvjp(_forward, _backward)
