"""`config.json` of a Gemma 1 model, read and written in the dialects of transformers 4 and 5.

Source: transformers 5.23 `configuration_gemma.py`; 4.x names are those of the published google/gemma configs.
"""

import dataclasses
from pathlib import Path

import orjson

from easylm_mling.config import ConfigError, ModelConfig, from_tree

_SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
_REQUIRED = (*_SHAPES, "num_attention_heads", "num_key_value_heads")
# What transformers assumes where a config.json is silent is also ModelConfig's default.
_IDS = ("pad_token_id", "eos_token_id", "bos_token_id")
_OPTIONAL = ("max_position_embeddings", "rms_norm_eps", "initializer_range", *_IDS)
# Gemma 1 was trained with the tanh form of GELU, and transformers reads its published "gelu" as that too.
_ACTIVATIONS = (None, "gelu", "gelu_pytorch_tanh")
# Settings with one value here; a file that leaves them out, or says null, means that value.
_FIXED = {"attention_bias": False, "tie_word_embeddings": True, "use_bidirectional_attention": False}


def model_config_from_hf(directory: str | Path) -> ModelConfig:
    """The ModelConfig of the Hugging Face model in `directory`.

    Raises ConfigError for a missing or unreadable config.json, another model type, and every setting that would make
    the model compute something else (biases, an untied head, scaled rotary embeddings, another activation).
    """
    path = Path(directory) / "config.json"
    found = read_json(path)
    kind = found.get("model_type")
    if kind != "gemma":
        raise ConfigError(f"{path}: model_type={kind!r} is not supported; use a Gemma 1 model ('gemma')")
    for key, wanted in _FIXED.items():
        if found.get(key) is not None and found[key] is not wanted:
            raise ConfigError(f"{path}: {key}={found[key]!r} is not supported; Gemma 1 has {wanted}")
    for key in ("hidden_act", "hidden_activation"):
        if found.get(key) not in _ACTIVATIONS:
            raise ConfigError(f"{path}: {key}={found[key]!r} is not supported; Gemma 1 has 'gelu_pytorch_tanh'")
    missing = [key for key in _REQUIRED if found.get(key) is None]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing; use the config.json that came with the weights")
    tree = {key: found[key] for key in (*_REQUIRED, *_OPTIONAL) if found.get(key) is not None}
    try:
        return from_tree(ModelConfig, tree | {"rope_theta": _rope_theta(found, path)})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rope_theta(found: dict, path: Path):
    """The rotary base, from `rope_theta` (4.x) or `rope_parameters` (5.x); where both are written they must agree."""
    if found.get("rope_scaling") is not None:
        raise ConfigError(f"{path}: rope_scaling={found['rope_scaling']!r} is not supported; Gemma 1 has null")
    rope = found.get("rope_parameters") or {}
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not plain or not rope.keys() <= {"rope_type", "rope_theta"}:
        raise ConfigError(f"{path}: rope_parameters={rope!r} is not supported; Gemma 1 has only a rope_theta")
    values = [v for v in (found.get("rope_theta"), rope.get("rope_theta")) if v is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise ConfigError(f"{path}: rope_theta={values[0]!r}, but rope_parameters has {values[1]!r}; make them equal")
    return values[0] if values else ModelConfig.rope_theta


def hf_config(model: ModelConfig, dtype: str) -> dict:
    """`config.json` for weights of `dtype` ("bfloat16" or "float32"), which transformers 4 and 5 read alike."""
    fields = dataclasses.asdict(model)
    theta = fields.pop("rope_theta")
    return {
        "architectures": ["GemmaForCausalLM"],
        **fields,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "hidden_act": "gelu_pytorch_tanh",
        # transformers 4
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": theta,
        "rope_scaling": None,
        "torch_dtype": dtype,
        # transformers 5
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "dtype": dtype,
    }


def hf_generation_config(model: ModelConfig) -> dict:
    """`generation_config.json`: without it a loader has to guess where a text ends."""
    return {name: getattr(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises ConfigError when it is missing or is anything else."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name a complete Hugging Face model directory")
    try:
        tree = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object; download it again")
    return tree


def write_json(path: Path, tree: dict):
    path.write_bytes(orjson.dumps(tree, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
