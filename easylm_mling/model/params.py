"""The parameter table: one row for every parameter, and nothing about it anywhere else.

Axis letters: L layers, V vocabulary, D embed, F mlp, N query heads, K key/value heads, H head_dim.

Kernels keep the orientation of Hugging Face's Linear weights, (out, in), with the heads as an axis of their own.
A Hugging Face tensor is therefore a plain reshape of one layer's slice: import and export copy bytes.
"""

import math
from dataclasses import dataclass, replace

from easylm_mling.config import ModelConfig


@dataclass(frozen=True)
class Parameter:
    """One parameter, float32. Where its first axis is `layers` it is the stack of that parameter of all layers."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical names, which model/sharding.py maps to mesh axes
    hf_name: str  # holds `{layer}` for a stack
    hf_shape: tuple[int, ...]  # of one Hugging Face tensor: one layer of a stack
    kind: str  # "kernel", "bias", "norm" or "embedding": decides the initial value and weight decay

    @property
    def stacked(self) -> bool:
        """True for a stack of layers."""
        return self.axes[0] == "layers"


def parameter_table(m: ModelConfig) -> list[Parameter]:
    """List every parameter in the order of Hugging Face's files, where a layer's tensors stand together."""
    V, D = m.vocab_size, m.hidden_size
    table = [Parameter("embed_tokens", (V, D), ("vocab", "embed"), "model.embed_tokens.weight", (V, D), "embedding")]
    table += _layer_rows(m)
    table.append(Parameter("norm", (D,), ("embed",), "model.norm.weight", (D,), "norm"))
    if not m.tie_word_embeddings:
        table.append(Parameter("lm_head", (V, D), ("vocab", "embed"), "lm_head.weight", (V, D), "embedding"))
    return table


def _layer_rows(m: ModelConfig) -> list[Parameter]:
    L, D, F = m.num_hidden_layers, m.hidden_size, m.intermediate_size
    N, K, H = m.num_attention_heads, m.num_key_value_heads, m.head_dim

    def row(name, shape, axes, hf_shape, kind):
        hf_name = f"model.layers.{{layer}}.{name}.weight"
        return Parameter(f"layers.{name}", (L, *shape), ("layers", *axes), hf_name, hf_shape, kind)

    def bias(name, heads, axis):
        # Flat, unlike the kernels: with two axes it is kept in float32 among the layers, as norms are.
        made = row(f"self_attn.{name}_bias", (heads * H,), (axis,), (heads * H,), "bias")
        return replace(made, hf_name=f"model.layers.{{layer}}.self_attn.{name}_proj.bias")

    def norm(name, size, axis="embed"):
        return row(name, (size,), (axis,), (size,), "norm")

    rows = [
        norm("input_layernorm", D),
        row("self_attn.q_proj", (N, H, D), ("heads", "head_dim", "embed"), (N * H, D), "kernel"),
        row("self_attn.k_proj", (K, H, D), ("kv_heads", "head_dim", "embed"), (K * H, D), "kernel"),
        row("self_attn.v_proj", (K, H, D), ("kv_heads", "head_dim", "embed"), (K * H, D), "kernel"),
        row("self_attn.o_proj", (D, N, H), ("embed", "heads", "head_dim"), (D, N * H), "kernel"),
        # Gemma 1 and Llama call the norm *before the MLP* post_attention; from Gemma 2 on it follows attention.
        norm("post_attention_layernorm", D),
        row("mlp.gate_proj", (F, D), ("mlp", "embed"), (F, D), "kernel"),
        row("mlp.up_proj", (F, D), ("mlp", "embed"), (F, D), "kernel"),
        row("mlp.down_proj", (D, F), ("embed", "mlp"), (D, F), "kernel"),
    ]
    if m.family.post_norms:
        rows += [norm("pre_feedforward_layernorm", D), norm("post_feedforward_layernorm", D)]
    if m.family.qk_norm:
        rows += [norm("self_attn.q_norm", H, "head_dim"), norm("self_attn.k_norm", H, "head_dim")]
    if m.family.qkv_bias:
        rows += [bias("q", N, "heads"), bias("k", K, "kv_heads"), bias("v", K, "kv_heads")]
    return rows


def parameter_count(m: ModelConfig) -> int:
    """Count the elements of all parameters."""
    return sum(math.prod(p.shape) for p in parameter_table(m))


def to_nested(flat: dict) -> dict:
    """Turn `{"a.b": x}` into `{"a": {"b": x}}`, the form of the model, the optimizer and checkpoints."""
    nested: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return nested


def to_flat(nested: dict, prefix: str = "") -> dict:
    """Turn `{"a": {"b": x}}` into `{"a.b": x}`."""
    flat = {}
    for name, value in nested.items():
        flat.update(to_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
