"""The second half of the gated MLP, activation(gate) * up and the down projection, with its own backward pass.

Every element's value is computed once, in the output of the product before it. XLA, left alone, would compute it in the
input of the products after it, and so again for each of their tiles of output: 0.4 of 3.8 s a step of Gemma 7B on a v5e-64.

Axis letters: B batch, T positions, D embed, F mlp.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

_barrier = jax.lax.optimization_barrier


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def gated_down(gate: jax.Array, up: jax.Array, down: jax.Array, activation: str) -> jax.Array:
    """[B, T, D] from gate, up [B, T, F] and down [D, F], all in the compute dtype; `activation` as Hugging Face names it."""
    hidden = _barrier(activated(gate, activation) * up)
    return jnp.einsum("btf,df->btd", hidden, down)


def _forward(gate, up, down, activation):
    return gated_down(gate, up, down, activation), (gate, up, down)


def _backward(activation, kept, by_out):
    gate, up, down = kept
    grad_hidden = jnp.einsum("btd,df->btf", by_out, down)
    wide, wide_up, by_wide = (x.astype(jnp.float32) for x in (gate, up, grad_hidden))
    share, slope = _sigmoid(wide, activation)
    value = wide * share
    by_gate = by_wide * wide_up * (share + value * (1.0 - share) * slope)
    pair = by_gate.astype(gate.dtype), (by_wide * value).astype(up.dtype)
    # Row by row: v6e's compiler would turn them, and first copy a gate and up that were kept: 7 of 41 ms a layer of 7B.
    by_gate, by_up = _barrier(tuple(with_layout_constraint(x, Layout((0, 1, 2))) for x in pair))
    by_down = jnp.einsum("btd,btf->df", by_out, value.astype(gate.dtype) * up)
    return by_gate, by_up, by_down


gated_down.defvjp(_forward, _backward)


def activated(x: jax.Array, activation: str) -> jax.Array:
    """The activation in float32, rounded to x's dtype last, as PyTorch has it."""
    wide = x.astype(jnp.float32)
    return (wide * _sigmoid(wide, activation)[0]).astype(x.dtype)


def _sigmoid(x: jax.Array, activation: str) -> tuple[jax.Array, jax.Array | float]:
    """sigmoid(u) of the activation x * sigmoid(u), and the slope of u.

    SiLU has u = x. The tanh form of GELU, (1 + tanh v) / 2 = sigmoid(2 v), is what Gemma was trained with; `jax.nn.gelu`
    rounds its two constants to bfloat16, 0.7979 to 0.7969.
    """
    if activation == "silu":
        return jax.nn.sigmoid(x), 1.0
    assert activation == "gelu_pytorch_tanh", activation
    one = 2.0 * (2.0 / math.pi) ** 0.5
    three = one * 0.044715
    square = jnp.square(x)
    return jax.nn.sigmoid(x * (one + three * square)), one + 3.0 * three * square
