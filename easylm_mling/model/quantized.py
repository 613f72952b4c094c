"""Products of 8 bits: both operands are rounded to int8 or fp8 as they are multiplied, and nothing is stored so.

Each vector that a product sums over, a token's activations or the weights of one output, has a scale of its own: its largest
absolute value. Scales and results are float32, and int8 products are summed exactly. Rounding has the gradient of the
identity. The weight's gradient is not of 8 bits: it sums over all tokens of a batch, where the error would be largest.

Sources: Qwix (google/qwix), whose `quantize` and `einsum` these are; SwitchBack (Wortsman et al. 2023, arXiv:2304.13013), which
products of the backward pass stay wide.
"""

from importlib.util import find_spec
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from easylm_mling.config import ProductsConfig
from easylm_mling.errors import check
from easylm_mling.hardware import chip_of

# fp8 is the type with more mantissa in both passes: with a scale for each vector its range is enough for gradients.
DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# What NVIDIA calls the first GPUs with fp8: Ada (8.9) and Hopper (9.0).
FIRST_FP8_GPU = (8, 9)


def check_products(products: ProductsConfig | None, device: Any):
    """Raise ConfigError if devices like `device`, one of JAX's, gain nothing by these products, or Qwix is missing.

    On CPUs all are allowed, for tests: they are slower there.
    """
    if products is None:
        return
    check(
        find_spec("qwix") is not None,
        "train.products needs Qwix; install it with pip install 'easylm-mling[quantized]', or leave train.products out",
    )
    for kind in products.kinds:
        wrong = _refusal(kind, device)
        check(not wrong, f"train.products={kind}: {wrong}")


def _refusal(kind: str, device: Any) -> str:
    """Return why `device` has no use for products of `kind`, and what to do; an empty string where it has."""
    if device.platform == "cpu":
        return ""
    if device.platform == "gpu":
        capability = str(getattr(device, "compute_capability", "0.0"))
        if tuple(map(int, capability.split("."))) < FIRST_FP8_GPU:
            return (
                f"{device.device_kind} has compute capability {capability}, and fp8 needs 8.9; leave train.products out"
            )
        return "" if kind == "fp8" else "int8 is for TPUs; on this GPU use fp8"
    chip = chip_of(device.device_kind)
    faster = [k for k in DTYPES if chip and chip.peak_in(k)]
    way_out = f"use {faster[0]}" if faster else "leave train.products out"
    return (
        "" if kind in faster else f"no faster than bfloat16 on {chip.name if chip else device.device_kind}; {way_out}"
    )


def multiply(spec: str, x: Float[Array, "..."], weight: Float[Array, "..."], kind: str | None) -> Float[Array, "..."]:
    """Compute `einsum(spec, x, weight)` in x's dtype, with both operands rounded to `kind`; None: to x's dtype."""
    if kind is None:
        return jnp.einsum(spec, x, weight.astype(x.dtype))
    import qwix

    inputs, out = spec.split("->")
    of_x, of_weight = inputs.split(",")

    def rounded(operand, of_operand):
        kept = [axis for axis, letter in enumerate(of_operand) if letter in out]
        return qwix.quantize(operand.astype(jnp.float32), DTYPES[kind], channelwise_axes=kept)

    product = qwix.einsum(spec, rounded(x, of_x), rounded(weight, of_weight), preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
