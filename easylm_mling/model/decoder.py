"""The decoder of all families, Gemma to Qwen: stacks of layers, run by scans over the periods of their kinds.

What differs from layer to layer is in model/layer_kinds.py; what differs from family to family is in config/model.py's
table of families.

Axis letters: B batch, T positions, D embed, F mlp, N query heads, K key/value heads, H head_dim, L layers, V vocabulary.
Sources: google/gemma_pytorch `model.py` and transformers' `modeling_gemma.py`, `modeling_gemma2.py`,
`modeling_gemma3.py`, `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py` and `modeling_qwen3.py`. Activations
and kernels have the compute dtype. Norms, rotary angles and softmax are float32, as in those files: bfloat16 is too
coarse for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from easylm_mling.config import ModelConfig
from easylm_mling.model.attention import attention, capped
from easylm_mling.model.embedding import lookup
from easylm_mling.model.gated_mlp import gated_down
from easylm_mling.model.layer_kinds import LayerKind, layer_kinds, runs, stacks
from easylm_mling.model.projection import project
from easylm_mling.model.remat import Remat
from easylm_mling.model.rotary import rotary, rotary_frequencies, scaled_frequencies
from easylm_mling.model.scanning import cut, scan_periods
from easylm_mling.model.sharding import constrain


@dataclass(frozen=True)
class ForwardOptions:
    """The static part of a forward pass: what its program is compiled for beside the model's shape."""

    dtype: DTypeLike  # of activations, and of kernels while they are used
    remat: Remat = Remat()
    attention: Callable = attention  # one with the signature of model/attention.py's
    float32_reduction: bool = False  # of the kernels' gradients over devices; else they are summed in `dtype`


Hidden = Float[Array, "B T D"]
Ids = Int32[Array, "B T"]
# (q, k, v, window, cache) of one layer -> (context [B, T, N, H], the cache with k and v). Training has no cache.
Attend = Callable[[Array, Array, Array, int | None, Any], tuple[Array, Any]]
LayerAttend = Callable[[Array, Array, Array], tuple[Array, Any]]  # with a layer's window and cache


def layer_frequencies(m: ModelConfig) -> dict[bool, Float32[Array, "_"]]:
    """Compute the rotary frequencies [H / 2], radians a position, of local layers (True) and of global ones (False)."""
    far = near = scaled_frequencies(rotary_frequencies(m.rope_theta, m.head_dim), m.rope_scaling, m.rope_theta)
    if not m.family.one_window:
        near = rotary_frequencies(m.rope_local_base_freq or m.rope_theta, m.head_dim)
    return {True: near, False: far}


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings, and with normed queries and keys where the family has them."""

    def __init__(self, m: ModelConfig, key: jax.Array):
        kq, kk, kv, ko = jax.random.split(key, 4)
        N, K, H, D = m.num_attention_heads, m.num_key_value_heads, m.head_dim, m.hidden_size
        self.q_proj = _kernel(kq, (N, H, D), m)
        self.k_proj = _kernel(kk, (K, H, D), m)
        self.v_proj = _kernel(kv, (K, H, D), m)
        self.o_proj = _kernel(ko, (D, N, H), m)
        if m.family.qk_norm:
            self.q_norm, self.k_norm = _norm_weight(H, m), _norm_weight(H, m)
        if m.family.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (nnx.Param(jnp.zeros(n * H, jnp.float32)) for n in (N, K, K))
        self.config = nnx.static(m)

    def __call__(
        self, x: Hidden, positions: Ids, frequencies: Float32[Array, "_"], attend: LayerAttend
    ) -> tuple[Hidden, Any]:
        """Return the output, in x's dtype, and what `attend(q, k, v)` made of the cache. `frequencies` are [H / 2]."""
        m = self.config
        q = project("btd,nhd->btnh", x, self.q_proj[...])
        k = project("btd,khd->btkh", x, self.k_proj[...])
        v = project("btd,khd->btkh", x, self.v_proj[...])
        if m.family.qkv_bias:
            q, k, v = _add_bias(q, self.q_bias), _add_bias(k, self.k_bias), _add_bias(v, self.v_bias)
        if m.family.qk_norm:
            q, k = _norm(q, self.q_norm, m), _norm(k, self.k_norm, m)
        magnitude = m.rope_scaling.magnitude if m.rope_scaling else 1.0
        q = checkpoint_name(rotary(q, positions, frequencies, scale=magnitude * m.query_scale), "q")
        k = checkpoint_name(rotary(k, positions, frequencies, scale=magnitude), "k")
        v = checkpoint_name(v, "v")
        q = constrain(q, "batch", "position", "heads", "head_dim")
        k = constrain(k, "batch", "position", "kv_heads", "head_dim")
        v = constrain(v, "batch", "position", "kv_heads", "head_dim")
        context, cache = attend(q, k, v)
        context = constrain(context, "batch", "position", "heads", "head_dim")
        return checkpoint_name(project("btnh,dnh->btd", context, self.o_proj[...]), "o"), cache


class MLP(nnx.Module):
    """The gated MLP: activation(gate) * up, projected down."""

    def __init__(self, m: ModelConfig, key: jax.Array):
        kg, ku, kd = jax.random.split(key, 3)
        self.gate_proj = _kernel(kg, (m.intermediate_size, m.hidden_size), m)
        self.up_proj = _kernel(ku, (m.intermediate_size, m.hidden_size), m)
        self.down_proj = _kernel(kd, (m.hidden_size, m.intermediate_size), m)
        self.activation = nnx.static(m.family.activation)

    def __call__(self, x: Hidden) -> Hidden:
        """Return the output, in x's dtype."""
        gate = checkpoint_name(project("btd,fd->btf", x, self.gate_proj[...]), "gate")
        up = checkpoint_name(project("btd,fd->btf", x, self.up_proj[...]), "up")
        gate, up = (constrain(part, "batch", "position", "mlp") for part in (gate, up))
        return gated_down(gate, up, self.down_proj[...], self.activation)


class Layer(nnx.Module):
    """Attention and MLP, each a sum with the residual stream behind a norm; some families norm the result too."""

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

    def __call__(
        self, x: Hidden, positions: Ids, frequencies: Float32[Array, "_"], attend: LayerAttend
    ) -> tuple[Hidden, Any]:
        """Return the residual stream behind this layer and the cache; arguments as of `Attention`."""
        m = self.config
        x = constrain(x, "batch", "position", "activation_embed")
        attended, cache = self.self_attn(_norm(x, self.input_layernorm, m), positions, frequencies, attend)
        if m.family.post_norms:
            x = x + _norm(attended, self.post_attention_layernorm, m)
            x = x + _norm(self.mlp(_norm(x, self.pre_feedforward_layernorm, m)), self.post_feedforward_layernorm, m)
        else:
            x = x + attended
            x = x + self.mlp(_norm(x, self.post_attention_layernorm, m))
        return constrain(x, "batch", "position", "activation_embed"), cache


class Gemma(nnx.Module):
    """The decoder. Its parameters are float32; the compute dtype is an option of each call."""

    def __init__(self, m: ModelConfig, key: jax.Array):
        embed_key, layers_key = jax.random.split(key)
        self.embed_tokens = _kernel(embed_key, (m.vocab_size, m.hidden_size), m)
        keys = jax.random.split(layers_key, m.num_hidden_layers)
        for stack, numbers in stacks(m).items():
            own = keys if len(numbers) == len(keys) else keys[jnp.asarray(numbers)]
            setattr(self, stack, jax.vmap(lambda k: Layer(m, k))(own))
        self.norm = _norm_weight(m.hidden_size, m)
        if not m.tie_word_embeddings:
            self.lm_head = _kernel(jax.random.fold_in(embed_key, 1), (m.vocab_size, m.hidden_size), m)
        self.config = nnx.static(m)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output head: the embedding itself where the two are tied."""
        return self.embed_tokens[...] if self.config.tie_word_embeddings else self.lm_head[...]

    def __call__(self, tokens: Ids, positions: Ids, segment_ids: Ids, options: ForwardOptions) -> Hidden:
        """Compute the final hidden states, in `options.dtype`. Positions count from 0 in each document."""

        def attend(q, k, v, window, cache):
            return options.attention(q, k, v, segment_ids, window, self.config.attn_logit_softcapping), cache

        return self.run(tokens, positions, attend, None, options)[0]

    def run(
        self, tokens: Ids, positions: Ids, attend: Attend, caches: Any, options: ForwardOptions
    ) -> tuple[Hidden, Any]:
        """Compute the final hidden states with any `attend`, and the caches it returns.

        `caches` has an entry for each scan, and in it one for each layer of a period: a pytree whose leaves have a leading
        axis of periods. None stands for no caches, as in training.
        """
        dtype, remat = options.dtype, options.remat
        x = constrain(lookup(self.embed_tokens[...], tokens, dtype), "batch", "position", "activation_embed")
        if self.config.family.scaled_embedding:
            # transformers multiplies by sqrt(D) rounded to the weights' dtype: 55.5 and not 55.4256 for 7B in bfloat16.
            x = x * jnp.asarray(self.config.hidden_size**0.5, dtype)
        frequencies = layer_frequencies(self.config)

        def one_layer(kind: LayerKind, x, layer: Layer, cache):
            near_or_far = frequencies[kind.local]
            return layer(x, positions, near_or_far, lambda q, k, v: attend(q, k, v, kind.window, cache))

        # Cast before the scans, so that stacked gradients are held in `dtype` too. Norms and biases (ndim 2) stay float32.
        layers = {stack: getattr(self, stack) for stack in stacks(self.config)}
        if not options.float32_reduction:
            layers = jax.tree.map(lambda a: a.astype(dtype) if a.ndim > 2 else a, layers)
        kinds = layer_kinds(self.config)
        scans = [
            (policy, run)
            for policy, begin, end in remat.portions(self.config.num_hidden_layers)
            for run in runs(kinds[begin:end])
        ]
        made = []
        parts = cut(layers, [run for _, run in scans])
        for (policy, run), part, cache in zip(scans, parts, caches or [None] * len(scans), strict=True):
            # A loop of one trip is none: its backward pass stands beside the forward pass, and may not be merged with it.
            wrap = partial(remat.wrap, policy=policy, beside_backward=run.count == 1)
            x, new = scan_periods(run, one_layer, wrap, x, part, cache)
            made.append(new)
        return _norm(x, self.norm, self.config), made


def rms_norm(
    x: Float[Array, "*shape D"], weight: Float32[Array, "D"], epsilon: float, offset: float = 1.0
) -> Float[Array, "*shape D"]:
    """RMSNorm times `offset + weight` (Gemma's offset is 1), computed in float32 and rounded to x's dtype last."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * (offset + weight.astype(jnp.float32))).astype(x.dtype)


def logits(
    hidden: Float[Array, "*shape D"], head: Float[Array, "V D"], soft_cap: float | None
) -> Float32[Array, "*shape V"]:
    """Compute logits through the output head, accumulated in float32 and soft-capped."""
    scores = jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return capped(scores, soft_cap)


def _kernel(key, shape, m: ModelConfig) -> nnx.Param:
    return nnx.Param(m.initializer_range * jax.random.normal(key, shape, jnp.float32))


def _add_bias(x: Float[Array, "B T heads H"], bias: nnx.Param) -> Float[Array, "B T heads H"]:
    """Add a float32 bias [heads * H], rounded to x's dtype last; its gradient is summed in float32."""
    return (x.astype(jnp.float32) + bias[...].reshape(x.shape[2:])).astype(x.dtype)


def _norm_weight(size: int, m: ModelConfig) -> nnx.Param:
    return nnx.Param(jnp.full((size,), 1.0 - m.family.norm_offset, jnp.float32))


def _norm(x, weight: nnx.Param, m: ModelConfig):
    return rms_norm(x, weight[...], m.rms_norm_eps, m.family.norm_offset)
