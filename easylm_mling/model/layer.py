"""One layer: attention and the MLP, each a sum with the residual stream, and what some families add.

Axis letters: B batch, T positions, D embed, F mlp, N query heads, K key/value heads, H head_dim, P width of a layer's own
input. Sources: as of model/decoder.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32, Int32

from easylm_mling.config import ModelConfig
from easylm_mling.model.gated_mlp import activated, gated, gated_down
from easylm_mling.model.layer_kinds import LayerKind
from easylm_mling.model.lora import NONE, LayerAdapters
from easylm_mling.model.projection import project
from easylm_mling.model.rotary import rotary
from easylm_mling.model.sharding import constrain

Hidden = Float[Array, "B T D"]
Ids = Int32[Array, "B T"]
KeysValues = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]
# (q, k, v) of a layer -> (context [B, T, N, H], its cache, the keys and values that layers which share them attend to)
LayerAttend = Callable[[Array, Array, Array], tuple[Array, Any, KeysValues]]


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings, and with normed queries, keys and values where the family has them."""

    def __init__(self, m: ModelConfig, kind: LayerKind, key: jax.Array):
        kq, kk, kv, ko = jax.random.split(key, 4)
        N, K, H, D = m.num_attention_heads, kind.kv_heads, kind.head_dim, m.hidden_size
        self.q_proj = kernel(kq, (N, H, D), m)
        if not kind.shares:
            self.k_proj = kernel(kk, (K, H, D), m)
            if not kind.k_eq_v:
                self.v_proj = kernel(kv, (K, H, D), m)
        self.o_proj = kernel(ko, (D, N, H), m)
        if m.family.qk_norm:
            self.q_norm = norm_weight(H, m)
            if not kind.shares:
                self.k_norm = norm_weight(H, m)
        if m.family.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (nnx.Param(jnp.zeros(n * H, jnp.float32)) for n in (N, K, K))
        self.config, self.k_eq_v = nnx.static(m), nnx.static(kind.k_eq_v)

    def __call__(
        self,
        x: Hidden,
        positions: Ids,
        frequencies: Float32[Array, "_"],
        attend: LayerAttend,
        given: KeysValues | None,
        adapters: LayerAdapters = NONE,
    ) -> tuple[Hidden, Any, KeysValues]:
        """Return the output, in x's dtype, and what `attend(q, k, v)` made of the cache and shows to later layers.

        `frequencies` are [H / 2]. A layer that shares an earlier one's keys and values attends to those, `given`.
        """
        m = self.config
        q = adapters.project("q_proj", "btd,nhd->btnh", x, self.q_proj[...])
        q = _heads_first(_add_bias(q, self.q_bias) if m.family.qkv_bias else q)
        q = norm(q, self.q_norm, m) if m.family.qk_norm else q
        magnitude = m.rope_scaling.magnitude if m.rope_scaling else 1.0
        q = checkpoint_name(rotary(q, positions, frequencies, scale=magnitude * m.query_scale), "q")
        k, v = given if given is not None else self._keys_values(x, positions, frequencies, magnitude, adapters)
        q = constrain(q, "batch", "position", "heads", "head_dim")
        context, cache, shown = attend(q, k, v)
        context = constrain(context, "batch", "position", "heads", "head_dim")
        out = checkpoint_name(adapters.project("o_proj", "btnh,dnh->btd", context, self.o_proj[...]), "o")
        return out, None if given is not None else cache, shown

    def _keys_values(self, x: Hidden, positions: Ids, frequencies, magnitude, adapters: LayerAdapters) -> KeysValues:
        m = self.config
        k = adapters.project("k_proj", "btd,khd->btkh", x, self.k_proj[...])
        v = k if self.k_eq_v else adapters.project("v_proj", "btd,khd->btkh", x, self.v_proj[...])
        if m.family.qkv_bias:
            k, v = _add_bias(k, self.k_bias), _add_bias(v, self.v_bias)
        k = _heads_first(k)
        if m.family.qk_norm:
            k = norm(k, self.k_norm, m)
        if m.family.gemma4:
            v = rms_norm(_heads_first(v), None, m.rms_norm_eps)
        k = checkpoint_name(rotary(k, positions, frequencies, scale=magnitude), "k")
        v = checkpoint_name(v, "v")
        k = constrain(k, "batch", "position", "kv_heads", "head_dim")
        return k, constrain(v, "batch", "position", "kv_heads", "head_dim")


class MLP(nnx.Module):
    """The gated MLP: activation(gate) * up, projected down."""

    def __init__(self, m: ModelConfig, width: int, key: jax.Array):
        kg, ku, kd = jax.random.split(key, 3)
        self.gate_proj = kernel(kg, (width, m.hidden_size), m)
        self.up_proj = kernel(ku, (width, m.hidden_size), m)
        self.down_proj = kernel(kd, (m.hidden_size, width), m)
        self.activation = nnx.static(m.family.activation)

    def __call__(self, x: Hidden, adapters: LayerAdapters = NONE) -> Hidden:
        """Return the output, in x's dtype."""
        gate = checkpoint_name(adapters.project("gate_proj", "btd,fd->btf", x, self.gate_proj[...]), "gate")
        up = checkpoint_name(adapters.project("up_proj", "btd,fd->btf", x, self.up_proj[...]), "up")
        gate, up = (constrain(part, "batch", "position", "mlp") for part in (gate, up))
        if "down_proj" not in adapters:
            return gated_down(gate, up, self.down_proj[...], self.activation, adapters.products)
        return adapters.project("down_proj", "btf,df->btd", gated(gate, up, self.activation), self.down_proj[...])


class Layer(nnx.Module):
    """Attention and MLP, each a sum with the residual stream behind a norm; some families norm the result too."""

    def __init__(self, m: ModelConfig, kind: LayerKind, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.input_layernorm = norm_weight(m.hidden_size, m)
        self.self_attn = Attention(m, kind, attention_key)
        self.post_attention_layernorm = norm_weight(m.hidden_size, m)
        self.mlp = MLP(m, kind.mlp_width, mlp_key)
        if m.family.post_norms:
            self.pre_feedforward_layernorm = norm_weight(m.hidden_size, m)
            self.post_feedforward_layernorm = norm_weight(m.hidden_size, m)
        if m.family.gemma4:
            self.layer_scalar = nnx.Param(jnp.ones(1, jnp.float32))
        if m.hidden_size_per_layer_input:
            width, (into, out) = m.hidden_size_per_layer_input, jax.random.split(jax.random.fold_in(key, 1))
            self.per_layer_input_gate = kernel(into, (width, m.hidden_size), m)
            self.per_layer_projection = kernel(out, (m.hidden_size, width), m)
            self.post_per_layer_input_norm = norm_weight(m.hidden_size, m)
        self.config = nnx.static(m)

    def __call__(
        self,
        x: Hidden,
        positions: Ids,
        frequencies: Float32[Array, "_"],
        attend: LayerAttend,
        given: KeysValues | None = None,
        own_input: Float[Array, "B T P"] | None = None,
        adapters: LayerAdapters = NONE,
    ) -> tuple[Hidden, Any, KeysValues]:
        """Return the residual stream behind this layer, and what `Attention` returns; arguments as of it.

        `own_input` is this layer's per-layer embedding, in models that have them, and `adapters` are its own.
        """
        m = self.config
        x = constrain(x, "batch", "position", "activation_embed")
        normed = norm(x, self.input_layernorm, m)
        attended, cache, shown = self.self_attn(normed, positions, frequencies, attend, given, adapters)
        if m.family.post_norms:
            x = x + norm(attended, self.post_attention_layernorm, m)
            through = self.mlp(norm(x, self.pre_feedforward_layernorm, m), adapters)
            x = x + norm(through, self.post_feedforward_layernorm, m)
        else:
            x = x + attended
            x = x + self.mlp(norm(x, self.post_attention_layernorm, m), adapters)
        if own_input is not None:
            gate = project("btd,pd->btp", x, self.per_layer_input_gate[...])
            out = project(
                "btp,dp->btd", activated(gate, m.family.activation) * own_input, self.per_layer_projection[...]
            )
            x = x + norm(out, self.post_per_layer_input_norm, m)
        if m.family.gemma4:
            x = (x.astype(jnp.float32) * self.layer_scalar[...]).astype(x.dtype)
        return constrain(x, "batch", "position", "activation_embed"), cache, shown


def rms_norm(
    x: Float[Array, "*shape D"], weight: Float32[Array, "D"] | None, epsilon: float, offset: float = 1.0
) -> Float[Array, "*shape D"]:
    """RMSNorm times `offset + weight` (Gemma's offset is 1), computed in float32 and rounded to x's dtype last.

    Without a weight the factor is 1.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    if weight is None:
        return wide.astype(x.dtype)
    return (wide * (offset + weight.astype(jnp.float32))).astype(x.dtype)


def kernel(key: jax.Array, shape: tuple[int, ...], m: ModelConfig) -> nnx.Param:
    """Make a fresh float32 kernel of this shape."""
    return nnx.Param(m.initializer_range * jax.random.normal(key, shape, jnp.float32))


def _heads_first(x: Float[Array, "B T heads H"]) -> Float[Array, "B T heads H"]:
    """Keep x, on a TPU, in the order in which its attention kernel reads it: all positions of a head after one another.

    Left to itself, the compiler lays positions out along a tile's lanes, for the sums of a norm, and then copies x.
    """
    ordered = partial(with_layout_constraint, layouts=Layout((0, 2, 1, 3)))
    return jax.lax.platform_dependent(x, tpu=ordered, default=lambda x: x)


def _add_bias(x: Float[Array, "B T heads H"], bias: nnx.Param) -> Float[Array, "B T heads H"]:
    """Add a float32 bias [heads * H], rounded to x's dtype last; its gradient is summed in float32."""
    return (x.astype(jnp.float32) + bias[...].reshape(x.shape[2:])).astype(x.dtype)


def norm_weight(size: int, m: ModelConfig) -> nnx.Param:
    """Make the weight with which a norm of this family multiplies by 1."""
    return nnx.Param(jnp.full((size,), 1.0 - m.family.norm_offset, jnp.float32))


def norm(x: Float[Array, "*shape D"], weight: nnx.Param, m: ModelConfig) -> Float[Array, "*shape D"]:
    """Compute `rms_norm` with the settings of the model."""
    return rms_norm(x, weight[...], m.rms_norm_eps, m.family.norm_offset)
