"""The decoder of all families, Gemma to Qwen: stacks of layers, run by scans over the periods of their kinds.

What differs from layer to layer is in model/layer_kinds.py; what differs from family to family is in config/model.py's
table of families.

Axis letters: B batch, T positions, D embed, F mlp, N query heads, K key/value heads, H head_dim, L layers, V vocabulary.
Sources: google/gemma_pytorch `model.py` and transformers' `modeling_gemma.py`, `modeling_gemma2.py`,
`modeling_gemma3.py`, `modeling_gemma4.py`, `modeling_gemma4_unified.py`, `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py` and `modeling_qwen3.py`. Activations
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
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from easylm_mling.config import ModelConfig, ProductsConfig
from easylm_mling.model.attention import attention, capped
from easylm_mling.model.embedding import lookup
from easylm_mling.model.layer import Hidden, Ids, KeysValues, Layer, kernel, norm, norm_weight
from easylm_mling.model.layer_kinds import LayerKind, Run, layer_kinds, runs, stacks
from easylm_mling.model.lora import Adapters, of_layer, stacked_adapters
from easylm_mling.model.per_layer import PerLayerInputs
from easylm_mling.model.remat import Remat
from easylm_mling.model.rotary import rotary_frequencies, scaled_frequencies
from easylm_mling.model.scanning import cut, cut_by_layer, scan_periods
from easylm_mling.model.sharding import constrain


@dataclass(frozen=True)
class ForwardOptions:
    """The static part of a forward pass: what its program is compiled for beside the model's shape."""

    dtype: DTypeLike  # of activations, and of kernels while they are used
    remat: Remat = Remat()
    attention: Callable = attention  # one with the signature of model/attention.py's
    float32_reduction: bool = False  # of the kernels' gradients over devices; else they are summed in `dtype`
    products: ProductsConfig | None = None  # of the layers' projections; None: in `dtype`


# (q, k, v, window, cache) of one layer -> (context [B, T, N, H], the cache with k and v, the keys and values that layers
# which share them attend to). Training has no cache.
Attend = Callable[[Array, Array, Array, int | None, Any], tuple[Array, Any, KeysValues]]


def layer_frequencies(m: ModelConfig) -> dict[bool, Float32[Array, "_"]]:
    """Compute the rotary frequencies [H / 2], radians a position, of local layers (True) and of global ones (False)."""
    whole = rotary_frequencies(m.rope_theta, m.global_head_dim or m.head_dim)
    far = near = scaled_frequencies(whole, m.rope_scaling, m.rope_theta)
    if not m.family.one_window:
        near = rotary_frequencies(m.rope_local_base_freq or m.rope_theta, m.head_dim)
    return {True: near, False: far}


class Gemma(nnx.Module):
    """The decoder. Its parameters are float32; the compute dtype is an option of each call."""

    def __init__(self, m: ModelConfig, key: jax.Array):
        embed_key, layers_key = jax.random.split(key)
        self.embed_tokens = kernel(embed_key, (m.vocab_size, m.hidden_size), m)
        if m.hidden_size_per_layer_input:
            self.per_layer = PerLayerInputs(m, jax.random.fold_in(embed_key, 2))
        keys = jax.random.split(layers_key, m.num_hidden_layers)
        for stack, numbers in stacks(m).items():
            own = keys if len(numbers) == len(keys) else keys[jnp.asarray(numbers)]
            kind = layer_kinds(m)[numbers[0]]
            setattr(self, stack, jax.vmap(lambda k, kind=kind: Layer(m, kind, k))(own))
        self.norm = norm_weight(m.hidden_size, m)
        if not m.tie_word_embeddings:
            self.lm_head = kernel(jax.random.fold_in(embed_key, 1), (m.vocab_size, m.hidden_size), m)
        self.config = nnx.static(m)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output head: the embedding itself where the two are tied."""
        return self.embed_tokens[...] if self.config.tie_word_embeddings else self.lm_head[...]

    def __call__(
        self,
        tokens: Ids,
        positions: Ids,
        segment_ids: Ids,
        options: ForwardOptions,
        adapters: Adapters | None = None,
    ) -> Hidden:
        """Compute the final hidden states, in `options.dtype`. Positions count from 0 in each document."""

        def attend(q, k, v, window, cache):
            return options.attention(q, k, v, segment_ids, window, self.config.attn_logit_softcapping), cache, (k, v)

        return self.run(tokens, positions, attend, None, options, adapters)[0]

    def run(
        self,
        tokens: Ids,
        positions: Ids,
        attend: Attend,
        caches: Any,
        options: ForwardOptions,
        adapters: Adapters | None = None,
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

        def one_layer(given: dict, kind: LayerKind, carry, part: tuple[Layer, Any], cache, own_input):
            (x, shown), (layer, beside) = carry, part
            reach = lambda q, k, v: attend(q, k, v, kind.window, cache)  # noqa: E731
            own = of_layer(adapters, beside, options.products)
            x, cache, new = layer(x, positions, frequencies[kind.local], reach, given.get(kind.local), own_input, own)
            return (x, {of: new if of == kind.local else old for of, old in shown.items()}), cache

        # Cast before the scans, so that stacked gradients are held in `dtype` too. Norms and biases (ndim 2) stay float32.
        layers = {stack: getattr(self, stack) for stack in stacks(self.config)}
        if not options.float32_reduction:
            layers = jax.tree.map(lambda a: a.astype(dtype) if a.ndim > 2 else a, layers)
        beside = stacked_adapters(self.config, adapters)
        scans = _scans(self.config, remat)
        parts = cut({stack: (layers[stack], beside[stack]) for stack in layers}, [run for _, run in scans])
        inputs = [None] * len(scans)
        if self.config.hidden_size_per_layer_input:
            inputs = cut_by_layer(self.per_layer(tokens, x), [run for _, run in scans])
        made, shown = [], {}
        for (policy, run), part, own, cache in zip(scans, parts, inputs, caches or [None] * len(scans), strict=True):
            wrap = partial(remat.wrap, policy=policy)
            given, carried = (shown, {}) if run.shares else ({}, _nothing_shown(self.config, run, cache, x))
            # What an inner scan saves, or caches, is copied once more, into the outer one's stack.
            nested = policy == "full" and cache is None
            (x, carried), new = scan_periods(
                run, partial(one_layer, given), wrap, (x, carried), part, own, cache, nested
            )
            made.append(new)
            shown = shown | carried
        return norm(x, self.norm, self.config), made


def _scans(m: ModelConfig, remat: Remat) -> list[tuple[str, Run]]:
    """List the remat policy and the layers of each scan."""
    kinds = layer_kinds(m)
    portions = remat.portions(m.num_hidden_layers)
    return [(policy, run) for policy, begin, end in portions for run in runs(kinds[begin:end])]


def _nothing_shown(m: ModelConfig, run: Run, caches: tuple | None, x: Hidden) -> dict[bool, Any]:
    """Return zeros in the form of the keys and values that later layers will share; {} in models that share none."""
    zeros = {}
    for kind, cache in zip(run.kinds, caches or (None,) * len(run.kinds), strict=True):
        if m.num_kv_shared_layers and cache is None:
            shape = (*x.shape[:2], kind.kv_heads, kind.head_dim)
            zeros[kind.local] = (jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype))
        elif m.num_kv_shared_layers:
            zeros[kind.local] = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), cache)
    return zeros


def logits(
    hidden: Float[Array, "*shape D"], head: Float[Array, "V D"], soft_cap: float | None
) -> Float32[Array, "*shape V"]:
    """Compute logits through the output head, accumulated in float32 and soft-capped."""
    scores = jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return capped(scores, soft_cap)
