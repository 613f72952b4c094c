"""Gemma as a stack of identical layers, run by one scan.

Axis letters: B batch, T positions, D embed, F mlp, N query heads, K key/value heads, H head_dim, L layers, V vocabulary.
Sources: google/gemma_pytorch `model.py` and transformers' `modeling_gemma.py`; the numerics that matter (float32 norms,
rotary angles and softmax, the rounding of the embedding scale) are said where they are done.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from easylm_mling.attention import attention
from easylm_mling.config import ModelConfig
from easylm_mling.sharding import constrain

_names = jax.checkpoint_policies.save_only_these_names
# What a layer keeps for its backward pass, from least memory and most recomputation to the reverse.
REMAT_POLICIES: dict[str, Callable | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": _names("attention"),
    "save_qkv": _names("attention", "q", "k", "v"),
    "save_dots": _names("attention", "q", "k", "v", "gate", "up", "o"),
    "none": None,
}

# (q, k, v of one layer, that layer's cache) -> (context [B, T, N, H], the cache afterwards). Training has no cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array, object], tuple[jax.Array, object]]


class Attention(nnx.Module):
    def __init__(self, m: ModelConfig, key: jax.Array):
        kq, kk, kv, ko = jax.random.split(key, 4)
        N, K, H, D = m.num_attention_heads, m.num_key_value_heads, m.head_dim, m.hidden_size
        self.q_proj = _kernel(kq, (N, H, D), m)
        self.k_proj = _kernel(kk, (K, H, D), m)
        self.v_proj = _kernel(kv, (K, H, D), m)
        self.o_proj = _kernel(ko, (D, N, H), m)
        self.config = nnx.static(m)

    def __call__(self, x, positions, attend: Attend, cache):
        m, dtype = self.config, x.dtype
        q = jnp.einsum("btd,nhd->btnh", x, self.q_proj[...].astype(dtype))
        k = jnp.einsum("btd,khd->btkh", x, self.k_proj[...].astype(dtype))
        v = jnp.einsum("btd,khd->btkh", x, self.v_proj[...].astype(dtype))
        q = checkpoint_name(rotary(q, positions, m.rope_theta, scale=m.head_dim**-0.5), "q")
        k = checkpoint_name(rotary(k, positions, m.rope_theta), "k")
        v = checkpoint_name(v, "v")
        q = constrain(q, "batch", "position", "heads", "head_dim")
        k = constrain(k, "batch", "position", "kv_heads", "head_dim")
        v = constrain(v, "batch", "position", "kv_heads", "head_dim")
        context, cache = attend(q, k, v, cache)
        context = constrain(checkpoint_name(context, "attention"), "batch", "position", "heads", "head_dim")
        return checkpoint_name(jnp.einsum("btnh,dnh->btd", context, self.o_proj[...].astype(dtype)), "o"), cache


class MLP(nnx.Module):
    def __init__(self, m: ModelConfig, key: jax.Array):
        kg, ku, kd = jax.random.split(key, 3)
        self.gate_proj = _kernel(kg, (m.intermediate_size, m.hidden_size), m)
        self.up_proj = _kernel(ku, (m.intermediate_size, m.hidden_size), m)
        self.down_proj = _kernel(kd, (m.hidden_size, m.intermediate_size), m)

    def __call__(self, x):
        gate = checkpoint_name(jnp.einsum("btd,fd->btf", x, self.gate_proj[...].astype(x.dtype)), "gate")
        up = checkpoint_name(jnp.einsum("btd,fd->btf", x, self.up_proj[...].astype(x.dtype)), "up")
        # The tanh form of GELU, which Gemma was trained with; the erf form is another function.
        hidden = constrain(jax.nn.gelu(gate, approximate=True) * up, "batch", "position", "mlp")
        return jnp.einsum("btf,df->btd", hidden, self.down_proj[...].astype(x.dtype))


class Layer(nnx.Module):
    def __init__(self, m: ModelConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.input_layernorm = nnx.Param(jnp.zeros((m.hidden_size,)))
        self.self_attn = Attention(m, attention_key)
        self.post_attention_layernorm = nnx.Param(jnp.zeros((m.hidden_size,)))
        self.mlp = MLP(m, mlp_key)
        self.epsilon = nnx.static(m.rms_norm_eps)

    def __call__(self, x, positions, attend: Attend, cache):
        x = constrain(x, "batch", "position", "activation_embed")
        attended, cache = self.self_attn(rms_norm(x, self.input_layernorm[...], self.epsilon), positions, attend, cache)
        x = x + attended
        x = x + self.mlp(rms_norm(x, self.post_attention_layernorm[...], self.epsilon))
        return constrain(x, "batch", "position", "activation_embed"), cache


class Gemma(nnx.Module):
    """Parameters are float32; the compute dtype is an argument of the call."""

    def __init__(self, m: ModelConfig, key: jax.Array):
        embed_key, layers_key = jax.random.split(key)
        self.embed_tokens = _kernel(embed_key, (m.vocab_size, m.hidden_size), m)
        self.layers = jax.vmap(lambda k: Layer(m, k))(jax.random.split(layers_key, m.num_hidden_layers))
        self.norm = nnx.Param(jnp.zeros((m.hidden_size,)))
        self.config = nnx.static(m)

    def __call__(self, tokens, positions, segment_ids, dtype, remat: str = "full") -> jax.Array:
        """Final hidden states [B, T, D] in `dtype`, for tokens, positions and segment_ids [B, T] int32."""

        def attend(q, k, v, cache):
            return attention(q, k, v, segment_ids), cache

        return self.run(tokens, positions, attend, None, dtype, remat)[0]

    def run(self, tokens, positions, attend: Attend, caches, dtype, remat: str):
        """The whole stack with any `attend`; `caches` is a pytree whose leaves have a leading axis of L layers."""
        # Gathered whole along D first: a lookup in rows cut along D would make XLA replicate its result.
        x = constrain(self.embed_tokens[...].astype(dtype), "vocab", "activation_embed")[tokens]
        x = constrain(x, "batch", "position", "activation_embed")
        # transformers multiplies by sqrt(D) rounded to the weights' dtype: 55.5 and not 55.4256 for 7B in bfloat16.
        x = x * jnp.asarray(self.config.hidden_size**0.5, dtype)

        def body(x, layer_and_cache):
            layer, cache = layer_and_cache
            return layer(x, positions, attend, cache)

        policy = REMAT_POLICIES[remat]
        body = body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=False)
        x, caches = jax.lax.scan(body, x, (self.layers, caches))
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps), caches


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm [..., D] with Gemma's `1 + weight`, wholly in float32 and rounded to x's dtype last."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)


def rotary(x: jax.Array, positions: jax.Array, theta: float, scale: float = 1.0) -> jax.Array:
    """Half-split rotary embedding of x [B, T, heads, H] at positions [B, T], times `scale`.

    Angles are float32: in bfloat16 positions would be wrong from 257 on.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def logits(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D] through the tied embedding [V, D]."""
    return jnp.einsum("...d,vd->...v", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _kernel(key, shape, m: ModelConfig) -> nnx.Param:
    return nnx.Param(m.initializer_range * jax.random.normal(key, shape, jnp.float32))
