"""The precision of matrix products: float32 ones are float32 on every kind of device.

By default, TPUs round both float32 operands of a product to bfloat16 (as fast as a bfloat16 product, and as coarse), and
GPUs round them to TF32. Only an explicit precision keeps all their bits: six passes of a TPU's matrix unit.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp


def products_in(dtype) -> AbstractContextManager:
    """A context for tracing a model that computes in `dtype`: its float32 products, kernels and gradients are exact.

    The backward pass must be traced in it, too: a custom one takes the precision of where it is traced.
    """
    return jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else nullcontext()
