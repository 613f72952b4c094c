"""The decoder of Gemma 1, 2, 3 and Llama: a stack of layers of one form, run by one scan.

What differs from layer to layer (the window, the rotary frequencies) is scanned beside the parameters; what differs
from family to family is in config/model.py's table of families.

Axis letters: B batch, T positions, D embed, F mlp, N query heads, K key/value heads, H head_dim, L layers, V vocabulary.
Sources: google/gemma_pytorch `model.py` and transformers' `modeling_gemma.py`, `modeling_gemma2.py`,
`modeling_gemma3.py`; the numerics that matter (float32 norms, rotary angles and softmax, the rounding of the embedding
scale) are said where they are done.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from easylm_mling.config import ModelConfig, RopeScaling
from easylm_mling.model.attention import attention, capped
from easylm_mling.model.embedding import lookup
from easylm_mling.model.gated_mlp import gated_down
from easylm_mling.model.sharding import constrain

# What a layer keeps for its backward pass, from least memory and most recomputation to the reverse; None: everything.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "save_attention": ("attention",),
    "save_out": ("attention", "o"),
    "save_qkv": ("attention", "o", "q", "k", "v"),
    "save_dots": ("attention", "o", "q", "k", "v", "gate", "up"),
    "none": None,
}


class Remat(NamedTuple):
    """Which policy the layers have, and another one for the first few: memory that is left over, spent on speed.

    Values named in `offload` wait in the host's memory instead of the device's, whatever the policy says of them.
    """

    policy: str
    first_policy: str = "none"
    first_layers: int = 0
    offload: tuple[str, ...] = ()

    def portions(self, layers: int) -> list[tuple[str, int, int]]:
        """(policy, first layer, layer after the last) of each portion that holds a layer."""
        first = min(self.first_layers, layers)
        both = [(self.first_policy, 0, first), (self.policy, first, layers)]
        return [portion for portion in both if portion[1] < portion[2]]

    def applied(self, body: Callable, policy: str) -> Callable:
        """A layer's function that keeps for its backward pass what `policy` and `offload` name."""
        kept = REMAT_POLICIES[policy]
        if kept is None:
            return body
        here = jax.checkpoint_policies.save_only_these_names(*kept)
        if self.offload:
            here = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[name for name in kept if name not in self.offload],
                names_which_can_be_offloaded=list(self.offload),
                offload_src="device",
                offload_dst="pinned_host",
            )
        return jax.checkpoint(body, policy=here, prevent_cse=False)


FULL_REMAT = Remat("full")

# (q, k, v of one layer, its window, its cache) -> (context [B, T, N, H], the cache afterwards). Training has no cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, object], tuple[jax.Array, object]]
# A window that no text reaches: that of a global layer beside local ones.
_WHOLE_TEXT = 2**31 - 1


class LayerTraits(NamedTuple):
    """What a layer has beside parameters, stacked over L layers for the scan."""

    frequencies: jax.Array  # float32 [H / 2]: radians a position
    window: jax.Array | None  # int32 positions; None when no layer of the model is local


def layer_traits(m: ModelConfig) -> LayerTraits:
    far = scaled_frequencies(rotary_frequencies(m.rope_theta, m.head_dim), m.rope_scaling)
    near = rotary_frequencies(m.rope_local_base_freq or m.rope_theta, m.head_dim)
    local = np.asarray(m.local_layers)
    frequencies = jnp.where(local[:, None], near, far)
    if m.sliding_window is None:
        return LayerTraits(frequencies, None)
    return LayerTraits(frequencies, jnp.asarray(np.where(local, m.sliding_window, _WHOLE_TEXT), jnp.int32))


class Attention(nnx.Module):
    def __init__(self, m: ModelConfig, key: jax.Array):
        kq, kk, kv, ko = jax.random.split(key, 4)
        N, K, H, D = m.num_attention_heads, m.num_key_value_heads, m.head_dim, m.hidden_size
        self.q_proj = _kernel(kq, (N, H, D), m)
        self.k_proj = _kernel(kk, (K, H, D), m)
        self.v_proj = _kernel(kv, (K, H, D), m)
        self.o_proj = _kernel(ko, (D, N, H), m)
        if m.family.qk_norm:
            self.q_norm, self.k_norm = _norm_weight(H, m), _norm_weight(H, m)
        self.config = nnx.static(m)

    def __call__(self, x, positions, traits: LayerTraits, attend: Attend, cache):
        m, dtype = self.config, x.dtype
        q = jnp.einsum("btd,nhd->btnh", x, self.q_proj[...].astype(dtype))
        k = jnp.einsum("btd,khd->btkh", x, self.k_proj[...].astype(dtype))
        v = jnp.einsum("btd,khd->btkh", x, self.v_proj[...].astype(dtype))
        if m.family.qk_norm:
            q, k = _norm(q, self.q_norm, m), _norm(k, self.k_norm, m)
        q = checkpoint_name(rotary(q, positions, traits.frequencies, scale=m.query_scale), "q")
        k = checkpoint_name(rotary(k, positions, traits.frequencies), "k")
        v = checkpoint_name(v, "v")
        q = constrain(q, "batch", "position", "heads", "head_dim")
        k = constrain(k, "batch", "position", "kv_heads", "head_dim")
        v = constrain(v, "batch", "position", "kv_heads", "head_dim")
        context, cache = attend(q, k, v, traits.window, cache)
        context = constrain(context, "batch", "position", "heads", "head_dim")
        return checkpoint_name(jnp.einsum("btnh,dnh->btd", context, self.o_proj[...].astype(dtype)), "o"), cache


class MLP(nnx.Module):
    def __init__(self, m: ModelConfig, key: jax.Array):
        kg, ku, kd = jax.random.split(key, 3)
        self.gate_proj = _kernel(kg, (m.intermediate_size, m.hidden_size), m)
        self.up_proj = _kernel(ku, (m.intermediate_size, m.hidden_size), m)
        self.down_proj = _kernel(kd, (m.hidden_size, m.intermediate_size), m)
        self.activation = nnx.static(m.family.activation)

    def __call__(self, x):
        gate = checkpoint_name(jnp.einsum("btd,fd->btf", x, self.gate_proj[...].astype(x.dtype)), "gate")
        up = checkpoint_name(jnp.einsum("btd,fd->btf", x, self.up_proj[...].astype(x.dtype)), "up")
        gate, up = (constrain(part, "batch", "position", "mlp") for part in (gate, up))
        return gated_down(gate, up, self.down_proj[...].astype(x.dtype), self.activation)


class Layer(nnx.Module):
    def __init__(self, m: ModelConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.input_layernorm = _norm_weight(m.hidden_size, m)
        self.self_attn = Attention(m, attention_key)
        self.post_attention_layernorm = _norm_weight(m.hidden_size, m)
        self.mlp = MLP(m, mlp_key)
        if m.family.post_norms:
            self.pre_feedforward_layernorm = _norm_weight(m.hidden_size, m)
            self.post_feedforward_layernorm = _norm_weight(m.hidden_size, m)
        self.config = nnx.static(m)

    def __call__(self, x, positions, traits: LayerTraits, attend: Attend, cache):
        m = self.config
        x = constrain(x, "batch", "position", "activation_embed")
        attended, cache = self.self_attn(_norm(x, self.input_layernorm, m), positions, traits, attend, cache)
        if m.family.post_norms:
            x = x + _norm(attended, self.post_attention_layernorm, m)
            x = x + _norm(self.mlp(_norm(x, self.pre_feedforward_layernorm, m)), self.post_feedforward_layernorm, m)
        else:
            x = x + attended
            x = x + self.mlp(_norm(x, self.post_attention_layernorm, m))
        return constrain(x, "batch", "position", "activation_embed"), cache


class Gemma(nnx.Module):
    """Parameters are float32; the compute dtype is an argument of the call."""

    def __init__(self, m: ModelConfig, key: jax.Array):
        embed_key, layers_key = jax.random.split(key)
        self.embed_tokens = _kernel(embed_key, (m.vocab_size, m.hidden_size), m)
        self.layers = jax.vmap(lambda k: Layer(m, k))(jax.random.split(layers_key, m.num_hidden_layers))
        self.norm = _norm_weight(m.hidden_size, m)
        if not m.tie_word_embeddings:
            self.lm_head = _kernel(jax.random.fold_in(embed_key, 1), (m.vocab_size, m.hidden_size), m)
        self.config = nnx.static(m)

    @property
    def head(self) -> jax.Array:
        """The output head [V, D]: the embedding itself where the two are tied."""
        return self.embed_tokens[...] if self.config.tie_word_embeddings else self.lm_head[...]

    def __call__(
        self, tokens, positions, segment_ids, dtype, remat: Remat = FULL_REMAT, by: Callable = attention
    ) -> jax.Array:
        """Final hidden states [B, T, D] in `dtype`, for tokens, positions and segment_ids [B, T] int32.

        `by`: what computes attention; a function like attention.attention.
        """

        def attend(q, k, v, window, cache):
            return by(q, k, v, segment_ids, window, self.config.attn_logit_softcapping), cache

        return self.run(tokens, positions, attend, None, dtype, remat)[0]

    def run(self, tokens, positions, attend: Attend, caches, dtype, remat: Remat):
        """The whole stack with any `attend`; `caches` is a pytree whose leaves have a leading axis of L layers."""
        x = constrain(lookup(self.embed_tokens[...], tokens, dtype), "batch", "position", "activation_embed")
        if self.config.family.scaled_embedding:
            # transformers multiplies by sqrt(D) rounded to the weights' dtype: 55.5 and not 55.4256 for 7B in bfloat16.
            x = x * jnp.asarray(self.config.hidden_size**0.5, dtype)

        def body(x, scanned):
            layer, traits, cache = scanned
            return layer(x, positions, traits, attend, cache)

        # All layers at once, so that their stacked gradients are held in `dtype` as well. Norms' weights stay float32.
        layers = jax.tree.map(lambda a: a.astype(dtype) if a.ndim > 2 else a, self.layers)
        stack = (layers, layer_traits(self.config), caches)
        parts = []
        for policy, begin, end in remat.portions(self.config.num_hidden_layers):
            whole = begin == 0 and end == self.config.num_hidden_layers
            layers = stack if whole else jax.tree.map(lambda a: a[begin:end], stack)  # noqa: B023
            x, part_caches = jax.lax.scan(remat.applied(body, policy), x, layers)
            parts.append(part_caches)
        caches = parts[0] if len(parts) == 1 else jax.tree.map(lambda *p: jnp.concatenate(p), *parts)
        return _norm(x, self.norm, self.config), caches


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float, offset: float = 1.0) -> jax.Array:
    """RMSNorm [..., D] times `offset + weight` (Gemma's offset is 1), wholly in float32 and rounded to x's dtype last."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * (offset + weight.astype(jnp.float32))).astype(x.dtype)


def rotary_frequencies(theta: float, head_dim: int) -> jax.Array:
    """float32 [H / 2]: theta ** (-2i / H) radians a position."""
    half = head_dim // 2
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def scaled_frequencies(frequencies: jax.Array, scaling: RopeScaling | None) -> jax.Array:
    """Source: transformers `modeling_rope_utils.py`, `linear` and `llama3`."""
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    waves = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((waves - low) / (high - low), 0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)


def rotary(x: jax.Array, positions: jax.Array, frequencies: jax.Array, scale: float = 1.0) -> jax.Array:
    """Half-split rotary embedding of x [B, T, heads, H] at positions [B, T], times `scale`; frequencies [H / 2].

    Angles are float32: in bfloat16 positions would be wrong from 257 on.
    """
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.concatenate([frequencies, frequencies])
    # The other half of each pair, signed, by a product with ones and minus ones: exact, and one pass over x where XLA makes
    # three of a concatenation on a TPU.
    half = x.shape[-1] // 2
    swap = np.roll(np.eye(x.shape[-1]), half, axis=1) * np.repeat([[1.0], [-1.0]], half, axis=0)
    other = jnp.einsum("btnh,hi->btni", x, jnp.asarray(swap, x.dtype), precision=jax.lax.Precision.HIGHEST)
    wide, other = x.astype(jnp.float32), other.astype(jnp.float32)
    return (wide * (jnp.cos(angles) * scale) + other * (jnp.sin(angles) * scale)).astype(x.dtype)


def logits(hidden: jax.Array, head: jax.Array, soft_cap: float | None) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D] through the output head [V, D], capped where there is a cap."""
    scores = jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return capped(scores, soft_cap)


def _kernel(key, shape, m: ModelConfig) -> nnx.Param:
    return nnx.Param(m.initializer_range * jax.random.normal(key, shape, jnp.float32))


def _norm_weight(size: int, m: ModelConfig) -> nnx.Param:
    return nnx.Param(jnp.full((size,), 1.0 - m.family.norm_offset, jnp.float32))


def _norm(x, weight: nnx.Param, m: ModelConfig):
    return rms_norm(x, weight[...], m.rms_norm_eps, m.family.norm_offset)
