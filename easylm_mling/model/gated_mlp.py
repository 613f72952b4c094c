"""The second half of the gated MLP, activation(gate) * up and the down projection, with its own backward pass.

Every element's value is computed once, in the output of the product before it. Left to XLA it would be computed in the
input of the products after it, once for each tile of their output: 0.4 of 3.8 s a step of Gemma 7B on a v5e-64.

Axis letters: B batch, T positions, D embed, F mlp.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from easylm_mling.config import ProductsConfig
from easylm_mling.model.quantized import multiply
from easylm_mling.model.sharding import in_two_sums

_barrier = jax.lax.optimization_barrier


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gated_down(
    gate: Float[Array, "B T F"],
    up: Float[Array, "B T F"],
    down: Float[Array, "D F"],
    activation: str,
    products: ProductsConfig | None = None,
) -> Float[Array, "B T D"]:
    """Compute activation(gate) * up, projected by `down`, in gate's dtype; `activation` is Hugging Face's name.

    With `products`, the projection is one of 8 bits (model/quantized.py). The gradient of `down` is summed over devices in
    the dtype of `down` (model/projection.py).
    """
    hidden = _barrier(activated(gate, activation) * up)
    return multiply("btf,df->btd", hidden, down, products and products.forward)


def _forward(gate, up, down, activation, products):
    return gated_down(gate, up, down, activation, products), (gate, up, down)


def _backward(activation, products, residuals, grad_out):
    gate, up, down = residuals
    grad_hidden = multiply("btd,df->btf", grad_out, down, products and products.backward)
    grad_gate, grad_up, hidden = _gradients(gate, up, grad_hidden, activation)
    grad_down = jnp.einsum("btd,btf->df", grad_out, hidden, preferred_element_type=down.dtype)
    return grad_gate, grad_up, in_two_sums(grad_down, 0)


gated_down.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: Float[Array, "B T F"], up: Float[Array, "B T F"], activation: str) -> Float[Array, "B T F"]:
    """Compute activation(gate) * up in gate's dtype, for more than one product."""
    return _barrier(activated(gate, activation) * up)


def _gated_forward(gate, up, activation):
    return gated(gate, up, activation), (gate, up)


def _gated_backward(activation, residuals, grad_hidden):
    gate, up = residuals
    return _gradients(gate, up, grad_hidden, activation)[:2]


gated.defvjp(_gated_forward, _gated_backward)


def _gradients(gate, up, grad_hidden, activation: str):
    """Return the gradients of gate and up, and activation(gate) * up again."""
    wide, wide_up, wide_grad = (x.astype(jnp.float32) for x in (gate, up, grad_hidden))
    share, slope = _sigmoid(wide, activation)
    value = wide * share
    grad_gate = wide_grad * wide_up * (share + value * (1.0 - share) * slope)
    pair = grad_gate.astype(gate.dtype), (wide_grad * value).astype(up.dtype)
    # In row-major order: v6e's compiler would transpose them and first copy a saved gate and up, 7 of 41 ms a layer of 7B.
    grad_gate, grad_up = _barrier(tuple(with_layout_constraint(x, Layout((0, 1, 2))) for x in pair))
    return grad_gate, grad_up, value.astype(gate.dtype) * up


def activated(x: Float[Array, "*shape"], activation: str) -> Float[Array, "*shape"]:
    """Compute the activation in float32 and round it to x's dtype last, as PyTorch does."""
    wide = x.astype(jnp.float32)
    return (wide * _sigmoid(wide, activation)[0]).astype(x.dtype)


def _sigmoid(x: jax.Array, activation: str) -> tuple[jax.Array, jax.Array | float]:
    """Return sigmoid(u) of the activation x * sigmoid(u), and the derivative of u.

    SiLU has u = x. Gemma was trained with the tanh form of GELU: (1 + tanh v) / 2 = sigmoid(2 v). `jax.nn.gelu` would round
    its two constants to bfloat16, 0.7979 to 0.7969.
    """
    if activation == "silu":
        return jax.nn.sigmoid(x), 1.0
    assert activation == "gelu_pytorch_tanh", activation
    one = 2.0 * (2.0 / math.pi) ** 0.5
    three = one * 0.044715
    square = jnp.square(x)
    return jax.nn.sigmoid(x * (one + three * square)), one + 3.0 * three * square
