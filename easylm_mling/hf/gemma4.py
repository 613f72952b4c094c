"""What `config.json` says of Gemma 4 alone: the heads of its global layers, and what is not supported.

Source: transformers 5.23 `configuration_gemma4.py` and `configuration_gemma4_unified.py`.
"""

from pathlib import Path

from easylm_mling.config import FAMILIES, ModelConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hf.rotary import FULL

_HEADS = ("global_head_dim", "num_global_key_value_heads")
# What transformers assumes for keys that a file leaves out.
_DEFAULTS = {
    "vocab_size": 262_144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "proportional", "factor": 1.0, "partial_rotary_factor": 0.25},
}
DEFAULTS = {
    "gemma4_text": _DEFAULTS
    | {"max_position_embeddings": 131_072, "sliding_window": 512, "hidden_size_per_layer_input": 256},
    "gemma4_unified_text": _DEFAULTS | {"max_position_embeddings": 262_144, "sliding_window": 1024},
}


def check_gemma4(file: dict, path: Path):
    """Raise ConfigError for what a Gemma 4 file may say and this code does not do."""
    default = DEFAULTS[file["model_type"]]
    rows, own = (file.get(k, default.get(k)) for k in ("vocab_size_per_layer_input", "hidden_size_per_layer_input"))
    if own and rows != file.get("vocab_size", default["vocab_size"]):
        raise ConfigError(
            f"{path}: vocab_size_per_layer_input={rows!r} is not supported; the embeddings of layers have vocab_size rows here"
        )
    if file.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise ConfigError(
            f"{path}: use_bidirectional_attention={file['use_bidirectional_attention']!r} is not supported; here a position "
            "attends to itself and to earlier ones"
        )


def read_heads(file: dict, tree: dict, path: Path) -> dict:
    """Return the head_dim and the number of key/value heads of global layers, from either of the forms that a file has.

    `tree` has the settings of local layers. Raises ConfigError for layers that differ in another way.
    """
    if not FAMILIES[tree["model_type"]].gemma4:
        return {}
    flat = {"global_head_dim": file.get("global_head_dim", 512), "num_global_key_value_heads": None}
    if tree.get("attention_k_eq_v"):
        flat["num_global_key_value_heads"] = file.get("num_global_key_value_heads")
    by_layer = file.get("per_layer_config")
    if by_layer is None:
        return flat
    kinds = file.get("layer_types")
    whole = {str(i) for i, kind in enumerate(kinds) if kind == FULL} if isinstance(kinds, list) else set()
    same = isinstance(by_layer, dict) and by_layer.keys() == whole and len({str(v) for v in by_layer.values()}) == 1
    given = next(iter(by_layer.values())) if same else None
    if not isinstance(given, dict) or not given.keys() <= {"head_dim", "num_key_value_heads"}:
        raise ConfigError(
            f"{path}: per_layer_config must give every {FULL} layer of layer_types, and no other, one head_dim and "
            "num_key_value_heads; layers that differ in another way are not supported"
        )
    out = {"global_head_dim": given.get("head_dim"), "num_global_key_value_heads": given.get("num_key_value_heads")}
    for key in _HEADS:
        if file.get(key) is not None and file[key] != out[key]:
            raise ConfigError(f"{path}: {key}={file[key]!r}, but per_layer_config has {out[key]!r}; make them equal")
    return out


def written_heads(model: ModelConfig) -> dict:
    """Return the keys of the heads, in the form that every transformers which knows Gemma 4 reads."""
    if not model.family.gemma4:
        return {}
    return {
        "global_head_dim": model.global_head_dim or model.head_dim,
        "num_global_key_value_heads": model.num_global_key_value_heads,
        "attention_k_eq_v": model.attention_k_eq_v,
        "num_kv_shared_layers": model.num_kv_shared_layers,
        "use_double_wide_mlp": model.use_double_wide_mlp,
        **(_only_here(model) if model.model_type == "gemma4_text" else {}),
    }


def _only_here(model: ModelConfig) -> dict:
    own = {"hidden_size_per_layer_input": model.hidden_size_per_layer_input, "enable_moe_block": False}
    return own | ({"vocab_size_per_layer_input": model.vocab_size} if model.hidden_size_per_layer_input else {})
