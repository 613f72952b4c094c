"""LoRA adapters: their start, their place in a layer's products, and their merge into the kernels.

A kernel W (out, in) stays as it is, and W x becomes W x + scale * B A dropout(x). A is uniform within 1/sqrt(in), and B zero,
so that training begins at the base. Factors are float32 stacks of layers, `{"lora": {stack: {projection: {"a", "b"}}}}`, in
the adapter table (model/params.py).

Axis letters: B batch, T positions, D embed, F mlp, N query heads, K key/value heads, H head_dim, R rank (`r` in einsum).
Sources: Hu et al. 2021, arXiv:2106.09685; peft `tuners/lora/layer.py` (`kaiming_uniform_` with a = sqrt 5 is the bound above).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from easylm_mling.config import PROJECTIONS, LoraConfig, ModelConfig, ProductsConfig
from easylm_mling.model.layer_kinds import stacks
from easylm_mling.model.params import ADAPTERS, adapter_table, parameter_table, to_flat, to_nested
from easylm_mling.model.precision import products_in
from easylm_mling.model.projection import project


@dataclass(frozen=True)
class Adapters:
    """The adapters of all layers, and how they act in this pass."""

    config: LoraConfig
    factors: dict[str, dict]  # stack -> projection -> {"a", "b"}, with a leading axis of layers
    key: Any = None  # of the dropout, which only training has: one for each step and microbatch


@dataclass(frozen=True)
class LayerAdapters:
    """The adapters of one layer, and what its own products are computed in."""

    config: LoraConfig
    factors: dict[str, dict[str, Array]]  # projection -> {"a", "b"}
    key: Any = None  # this layer's
    products: ProductsConfig | None = None  # of kernels; adapters' are never of 8 bits

    def __contains__(self, name: str) -> bool:
        return name in self.factors

    def project(self, name: str, spec: str, x: Float[Array, "..."], weight: Array) -> Float[Array, "..."]:
        """Compute `einsum(spec, x, weight)` in x's dtype, with the adapter of the projection `name` if there is one."""
        out = project(spec, x, weight, self.products)
        if name not in self.factors:
            return out
        a, b = self.factors[name]["a"], self.factors[name]["b"]
        into, back = factor_specs(spec)
        narrow = project(into, self._dropout(name, x), a)
        return out + (self.config.scale * project(back, narrow, b).astype(jnp.float32)).astype(out.dtype)

    def _dropout(self, name: str, x: Array) -> Array:
        rate = self.config.dropout
        if self.key is None or not rate:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(self.key, PROJECTIONS.index(name)), 1.0 - rate, x.shape)
        return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


NONE = LayerAdapters(LoraConfig(), {})


def stacked_adapters(m: ModelConfig, adapters: Adapters | None) -> dict[str, Any]:
    """Return what a scan takes beside each stack of layers: their factors and numbers; None without adapters."""
    if adapters is None:
        return dict.fromkeys(stacks(m))
    return {stack: (adapters.factors.get(stack, {}), jnp.asarray(n, jnp.int32)) for stack, n in stacks(m).items()}


def of_layer(adapters: Adapters | None, beside: Any, products: ProductsConfig | None) -> LayerAdapters:
    """Return the adapters of one layer, by its part of what `stacked_adapters` returned."""
    if adapters is None:
        return replace(NONE, products=products)
    factors, number = beside
    key = None if adapters.key is None else jax.random.fold_in(adapters.key, number)
    return LayerAdapters(adapters.config, factors, key, products)


def factor_specs(spec: str) -> tuple[str, str]:
    """Return the einsum specs of A and of B for that of their kernel.

    >>> factor_specs("btd,nhd->btnh")
    ('btd,rd->btr', 'btr,nhr->btnh')
    """
    inputs, out = spec.split("->")
    x, weight = inputs.split(",")
    summed, kept = ("".join(c for c in weight if (c in x) is inside) for inside in (True, False))
    narrow = "".join(c for c in x if c not in summed) + "r"
    return f"{x},r{summed}->{narrow}", f"{narrow},{kept}r->{out}"


# What seeds the keys of adapters besides the run's seed, which the model's own parameters have, too.
_START, _DROPOUT = 0x10A, 0x10B


def dropout_key(seed: int, step: ArrayLike, microbatch: ArrayLike) -> jax.Array:
    """Return the key of all dropout in a microbatch (from 0) of the batch after `step`; layers and projections fold in theirs.

    Masks depend on nothing else: not on hosts, devices or restarts.
    """
    key = jax.random.fold_in(jax.random.key(seed), _DROPOUT)
    return jax.random.fold_in(jax.random.fold_in(key, step), microbatch)


def init_adapters(m: ModelConfig, lora: LoraConfig, seed: int) -> dict:
    """Return fresh float32 adapters as a nested dict; the same bits on any mesh when jitted with shardings."""
    key = jax.random.fold_in(jax.random.key(seed), _START)
    flat = {}
    for p in adapter_table(m, lora):
        name, factor = p.path.split(".")[2:]
        if factor == "b":
            flat[p.path] = jnp.zeros(p.shape, jnp.float32)
            continue
        bound, own = 1.0 / math.sqrt(p.hf_shape[1]), jax.random.fold_in(key, PROJECTIONS.index(name))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.asarray(p.layers))
        draw = jax.vmap(
            lambda k, shape=p.shape[1:], bound=bound: jax.random.uniform(k, shape, jnp.float32, -bound, bound)
        )
        flat[p.path] = draw(keys)
    return to_nested(flat)


def merged(params: dict, adapters: dict, m: ModelConfig, lora: LoraConfig, in_place: bool = False) -> dict:
    """Return `params`, as a nested dict of float32 arrays, with W + scale * B A for each adapted kernel, in float32.

    With `in_place` the kernels are donated, one after another, and keep their shardings.
    """
    flat, factors = to_flat(params), adapters[ADAPTERS]
    for p in parameter_table(m):
        stack, name = p.path.partition(".")[0], p.path.rpartition(".")[2]
        if name in factors.get(stack, {}):
            kernel, run = flat[p.path], merged_kernel
            if in_place:
                run = jax.jit(run, static_argnums=3, donate_argnums=0, out_shardings=kernel.sharding)
            flat[p.path] = run(kernel, factors[stack][name]["a"], factors[stack][name]["b"], lora.scale)
    return to_nested(flat)


def merged_kernel(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """Return kernel + scale * B A for a stack of layers, all float32, each factor with the axes of the adapter table."""
    layers, rank = a.shape[:2]
    with products_in(jnp.float32):
        product = jnp.einsum("lor,lri->loi", b.reshape(layers, -1, rank), a.reshape(layers, rank, -1))
    return kernel + scale * product.reshape(kernel.shape)
