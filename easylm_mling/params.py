"""The parameter table: one row for every parameter, and nothing about it anywhere else.

Axis letters: L layers, V vocabulary, D embed, F mlp, N query heads, K key/value heads, H head_dim.

Kernels keep the orientation of Hugging Face's Linear weights, (out, in), with the heads as an axis of their own.
A Hugging Face tensor is therefore a plain reshape of one layer's slice: import and export copy bytes.
"""

from dataclasses import dataclass

from easylm_mling.config import ModelConfig


@dataclass(frozen=True)
class Parameter:
    """One parameter. `axes` are logical names (sharding.py maps them to mesh axes); a leading `layers` axis is the
    stack of all layers, and `hf_name` then holds `{layer}`. `hf_shape` is the shape of one Hugging Face tensor."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    hf_shape: tuple[int, ...]
    kind: str  # "kernel", "norm" or "embedding": decides the initial value and weight decay

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


def parameter_table(m: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, in the order of Hugging Face's files."""
    L, V, D, F = m.num_hidden_layers, m.vocab_size, m.hidden_size, m.intermediate_size
    N, K, H = m.num_attention_heads, m.num_key_value_heads, m.head_dim
    layer = "model.layers.{layer}"
    norm, heads, kv = (
        ("layers", "embed"),
        ("layers", "heads", "head_dim", "embed"),
        ("layers", "kv_heads", "head_dim", "embed"),
    )
    mlp_in, mlp_out = ("layers", "mlp", "embed"), ("layers", "embed", "mlp")
    out = ("layers", "embed", "heads", "head_dim")
    row = Parameter
    return [
        row("embed_tokens", (V, D), ("vocab", "embed"), "model.embed_tokens.weight", (V, D), "embedding"),
        row("layers.input_layernorm", (L, D), norm, f"{layer}.input_layernorm.weight", (D,), "norm"),
        row("layers.self_attn.q_proj", (L, N, H, D), heads, f"{layer}.self_attn.q_proj.weight", (N * H, D), "kernel"),
        row("layers.self_attn.k_proj", (L, K, H, D), kv, f"{layer}.self_attn.k_proj.weight", (K * H, D), "kernel"),
        row("layers.self_attn.v_proj", (L, K, H, D), kv, f"{layer}.self_attn.v_proj.weight", (K * H, D), "kernel"),
        row("layers.self_attn.o_proj", (L, D, N, H), out, f"{layer}.self_attn.o_proj.weight", (D, N * H), "kernel"),
        # Gemma 1 calls the norm *before the MLP* post_attention.
        row("layers.post_attention_layernorm", (L, D), norm, f"{layer}.post_attention_layernorm.weight", (D,), "norm"),
        row("layers.mlp.gate_proj", (L, F, D), mlp_in, f"{layer}.mlp.gate_proj.weight", (F, D), "kernel"),
        row("layers.mlp.up_proj", (L, F, D), mlp_in, f"{layer}.mlp.up_proj.weight", (F, D), "kernel"),
        row("layers.mlp.down_proj", (L, D, F), mlp_out, f"{layer}.mlp.down_proj.weight", (D, F), "kernel"),
        row("norm", (D,), ("embed",), "model.norm.weight", (D,), "norm"),
    ]


def parameter_count(m: ModelConfig) -> int:
    total = 0
    for p in parameter_table(m):
        size = 1
        for n in p.shape:
            size *= n
        total += size
    return total


def to_nested(flat: dict) -> dict:
    """`{"a.b": x}` as `{"a": {"b": x}}`: the form in which the model, the optimizer and checkpoints hold parameters."""
    nested: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return nested


def to_flat(nested: dict, prefix: str = "") -> dict:
    """The inverse of `to_nested`."""
    flat = {}
    for name, value in nested.items():
        flat.update(to_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
