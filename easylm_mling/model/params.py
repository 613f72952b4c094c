"""The parameter table: one row for every parameter, and nothing about it anywhere else.

Axis letters: L layers of a stack, V vocabulary, D embed, F mlp, N query heads, K key/value heads, H head_dim,
R rank of an adapter.

Kernels keep the orientation of Hugging Face's Linear weights, (out, in), with the heads as an axis of their own.
A Hugging Face tensor is therefore a plain reshape of one layer's slice: import and export copy bytes.
"""

import math
from dataclasses import dataclass, replace

from easylm_mling.config import LoraConfig, ModelConfig
from easylm_mling.model.layer_kinds import LayerKind, layer_kinds, stacks

# The subtree of adapters in a tree of parameters.
ADAPTERS = "lora"


@dataclass(frozen=True)
class Parameter:
    """One parameter, float32. Where its first axis is `layers` it is the stack of that parameter of all layers."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical names, which model/sharding.py maps to mesh axes
    hf_name: str  # holds `{layer}` for a stack
    hf_shape: tuple[int, ...]  # of one Hugging Face tensor: one layer of a stack
    kind: str  # "kernel", "bias", "norm", "embedding" or "scalar": decides the initial value and weight decay
    layers: tuple[int, ...] = ()  # the numbers of a stack's layers, in order

    @property
    def stacked(self) -> bool:
        """True for a stack of layers."""
        return self.axes[0] == "layers"

    @property
    def hf_names(self) -> list[str]:
        """The Hugging Face tensors that it is made of: one, or one for each layer."""
        return [self.hf_name.format(layer=layer) for layer in self.layers] if self.stacked else [self.hf_name]


def parameter_table(m: ModelConfig) -> list[Parameter]:
    """List every parameter in the order of Hugging Face's files, where a layer's tensors stand together."""
    V, D = m.vocab_size, m.hidden_size
    table = [Parameter("embed_tokens", (V, D), ("vocab", "embed"), "model.embed_tokens.weight", (V, D), "embedding")]
    if m.hidden_size_per_layer_input:
        table += _per_layer_rows(m)
    for numbers in stacks(m).values():
        table += _layer_rows(m, layer_kinds(m)[numbers[0]], numbers)
    table.append(Parameter("norm", (D,), ("embed",), "model.norm.weight", (D,), "norm"))
    if not m.tie_word_embeddings:
        table.append(Parameter("lm_head", (V, D), ("vocab", "embed"), "lm_head.weight", (V, D), "embedding"))
    return table


def _per_layer_rows(m: ModelConfig) -> list[Parameter]:
    """List the parameters of model/per_layer.py; `columns` are cut as the embedding's are."""
    V, D, P, columns = m.vocab_size, m.hidden_size, m.hidden_size_per_layer_input, _per_layer_columns(m)
    table, projection = (V, columns), (columns, D)
    return [
        Parameter(
            "per_layer.embed_tokens",
            table,
            ("vocab", "embed"),
            "model.embed_tokens_per_layer.weight",
            table,
            "embedding",
        ),
        Parameter(
            "per_layer.model_projection",
            projection,
            ("per_layer", "embed"),
            "model.per_layer_model_projection.weight",
            projection,
            "kernel",
        ),
        Parameter(
            "per_layer.projection_norm", (P,), ("per_layer",), "model.per_layer_projection_norm.weight", (P,), "norm"
        ),
    ]


def _per_layer_columns(m: ModelConfig) -> int:
    return m.num_hidden_layers * m.hidden_size_per_layer_input


def looked_up_only(m: ModelConfig) -> int:
    """Count the elements of embeddings that take part in no product."""
    return m.vocab_size * (_per_layer_columns(m) + (0 if m.tie_word_embeddings else m.hidden_size))


def _layer_rows(m: ModelConfig, layer: LayerKind, numbers: tuple[int, ...]) -> list[Parameter]:
    """List the parameters of one stack, whose layers are of one shape, that of `layer`."""
    L, D, F = len(numbers), m.hidden_size, layer.mlp_width
    N, K, H = m.num_attention_heads, layer.kv_heads, layer.head_dim
    few = "kv_heads" if m.num_key_value_heads == K else "global_kv_heads"

    def row(name, shape, axes, hf_shape, kind):
        hf_name = f"model.layers.{{layer}}.{name}.weight"
        return Parameter(f"{layer.stack}.{name}", (L, *shape), ("layers", *axes), hf_name, hf_shape, kind, numbers)

    def bias(name, heads, axis):
        # Flat, unlike the kernels: with two axes it is kept in float32 among the layers, as norms are.
        made = row(f"self_attn.{name}_bias", (heads * H,), (axis,), (heads * H,), "bias")
        return replace(made, hf_name=f"model.layers.{{layer}}.self_attn.{name}_proj.bias")

    def norm(name, size, axis="embed"):
        return row(name, (size,), (axis,), (size,), "norm")

    rows = [
        norm("input_layernorm", D),
        row("self_attn.q_proj", (N, H, D), ("heads", "head_dim", "embed"), (N * H, D), "kernel"),
        row("self_attn.k_proj", (K, H, D), (few, "head_dim", "embed"), (K * H, D), "kernel"),
        row("self_attn.v_proj", (K, H, D), (few, "head_dim", "embed"), (K * H, D), "kernel"),
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
    absent = ("k_proj", "v_proj", "k_norm") if layer.shares else ("v_proj",) if layer.k_eq_v else ()
    rows = [r for r in rows if not r.path.endswith(absent)]
    if m.family.qkv_bias:
        rows += [bias("q", N, "heads"), bias("k", K, few), bias("v", K, few)]
    if m.family.gemma4:
        scalar = row("layer_scalar", (1,), ("scalar",), (1,), "scalar")
        rows.append(replace(scalar, hf_name="model.layers.{layer}.layer_scalar"))
    if P := m.hidden_size_per_layer_input:
        rows += [
            row("per_layer_input_gate", (P, D), ("per_layer", "embed"), (P, D), "kernel"),
            row("per_layer_projection", (D, P), ("embed", "per_layer"), (D, P), "kernel"),
            norm("post_per_layer_input_norm", D),
        ]
    return rows


def adapter_table(m: ModelConfig, lora: LoraConfig) -> list[Parameter]:
    """List the factors of every adapter (model/lora.py), A before B; the names are PEFT's, in its order of shapes.

    Beside a kernel (out, in) stand A (R, in) and B (out, R), with the heads as an axis of their own where the kernel has it.
    Their long sides are cut over fsdp, as the kernel is, also where that side of the kernel is not.
    """
    cut, rows = {"head_dim": "adapter_head_dim", "mlp": "adapter_mlp"}, []
    for p in parameter_table(m):
        stack, name = p.path.partition(".")[0], p.path.rpartition(".")[2]
        if not p.stacked or name not in lora.projections:
            continue
        # Of o_proj and down_proj the first axis is the output, of the others all but the last are.
        first = 2 if p.axes[1] == "embed" else len(p.axes) - 1
        axes = tuple(cut.get(axis, axis) for axis in p.axes)
        of_a = (len(p.layers), lora.rank, *p.shape[first:]), ("layers", "rank", *axes[first:])
        of_b = (*p.shape[:first], lora.rank), (*axes[:first], "rank")
        stem, (out, into) = f"base_model.model.{p.hf_name.removesuffix('.weight')}", p.hf_shape
        for factor, (shape, logical), hf_shape in (("A", of_a, (lora.rank, into)), ("B", of_b, (out, lora.rank))):
            path = f"{ADAPTERS}.{stack}.{name}.{factor.lower()}"
            hf_name = f"{stem}.lora_{factor}.weight"
            rows.append(Parameter(path, shape, logical, hf_name, hf_shape, "kernel", p.layers))
    return rows


def parameter_count(m: ModelConfig) -> int:
    """Count the elements of all parameters."""
    return sum(math.prod(p.shape) for p in parameter_table(m))


def trained_count(m: ModelConfig, lora: LoraConfig | None) -> int:
    """Count the elements that are trained: of the adapters, or of all parameters without them."""
    return sum(math.prod(p.shape) for p in adapter_table(m, lora)) if lora else parameter_count(m)


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
