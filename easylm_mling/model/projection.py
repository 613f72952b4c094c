"""Products of activations with weights, and how their weights' gradients are summed over devices.

In a product's own dtype, each device rounds its part of a weight's gradient before the parts are summed, and so does every
sum on the way. In float32 nothing is rounded, for twice the bytes between devices.

A device needs its own part of a sum only, and the TPU compiler scatters sums where the parts fit its tiles and the devices
are not all there are. Else it sends every device all of the sum, for twice the bytes; so the gradient is then made in a
form, and summed in steps, that it scatters.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from easylm_mling.config import ProductsConfig
from easylm_mling.model.quantized import multiply
from easylm_mling.model.sharding import fits_tiles, fsdp_is_all, in_two_sums


def project(
    spec: str, x: Float[Array, "..."], weight: Float[Array, "..."], products: ProductsConfig | None = None
) -> Float[Array, "..."]:
    """Compute `einsum(spec, x, weight)` in x's dtype; the weight's gradient is summed over devices in the weight's dtype.

    The letter d stands for the embed axis, which fsdp cuts. With `products`, operands are of 8 bits (model/quantized.py); not
    those of the weight's gradient.
    """
    _, of_weight, _ = _letters(spec)
    fits = fits_tiles(weight.shape[of_weight.index("d")]) if "d" in of_weight else (True, True)
    if not products and weight.dtype == x.dtype and all(fits) and not fsdp_is_all():
        return jnp.einsum(spec, x, weight)
    return _project(spec, fits, products, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(spec, fits, products, x, weight):
    return multiply(spec, x, weight, products and products.forward)


def _forward(spec, fits, products, x, weight):
    return _project(spec, fits, products, x, weight), (x, weight)


def _backward(spec, fits, products, residuals, grad_out):
    x, weight = residuals
    of_x, of_weight, out = _letters(spec)
    grad_x = multiply(f"{out},{of_weight}->{of_x}", grad_out, weight, products and products.backward)
    if all(fits):
        grad = jnp.einsum(f"{of_x},{out}->{of_weight}", x, grad_out, preferred_element_type=weight.dtype)
        return grad_x, in_two_sums(grad, of_weight.index("d")) if "d" in of_weight else grad
    return grad_x, _gradient_in_rows(spec, x, grad_out, weight, flat=not fits[0])


_project.defvjp(_forward, _backward)


def _gradient_in_rows(spec, x, grad_out, weight, flat: bool):
    """Compute the weight's gradient with d as its first axis, so that parts of d lie along the rows of tiles.

    With `flat` it is a matrix, the only form in which the compiler pads rows that fill no whole tiles. To make one
    axis of heads and head_dim copies them, so that is done for those alone.
    """
    of_x, of_weight, out = _letters(spec)
    others = of_weight.replace("d", "")
    if flat and len(others) > 1:
        narrow, wide = (x, grad_out) if "d" in of_x else (grad_out, x)
        rows = jnp.einsum("btd,bte->de", narrow, wide.reshape(*wide.shape[:2], -1), preferred_element_type=weight.dtype)
    else:
        rows = jnp.einsum(f"{of_x},{out}->d{others}", x, grad_out, preferred_element_type=weight.dtype)
    # The compiler would take the change of form into the product.
    rows = jax.lax.optimization_barrier(in_two_sums(rows, 0))
    axis = of_weight.index("d")
    rest = weight.shape[:axis] + weight.shape[axis + 1 :]
    return jnp.moveaxis(rows.reshape(rows.shape[0], *rest), 0, axis)


def _letters(spec: str) -> tuple[str, str, str]:
    """Return the letters of x, of the weight and of the output."""
    inputs, out = spec.split("->")
    of_x, of_weight = inputs.split(",")
    return of_x, of_weight, out
