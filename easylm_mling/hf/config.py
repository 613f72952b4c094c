"""Read and write `config.json` of Gemma 1, 2, 3 (text) and Llama, in the dialects of transformers 4 and 5.

Source: transformers 5.23 `configuration_gemma.py`, `configuration_gemma2.py`, `configuration_gemma3.py` and
`configuration_llama.py`; 4.x names are those of the published configs.
"""

import dataclasses
import logging
from pathlib import Path

import orjson

from easylm_mling.config import FAMILIES, ModelConfig, from_tree
from easylm_mling.data.tokenization.files import JSON, MODEL
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError

_SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
_REQUIRED = (*_SHAPES, "num_attention_heads", "num_key_value_heads")
_IDS = ("pad_token_id", "eos_token_id", "bos_token_id")
# Where a file leaves one of these out, transformers assumes ModelConfig's default.
_OPTIONAL = ("max_position_embeddings", "rms_norm_eps", "initializer_range", *_IDS)
# What it assumes for other keys. Published multimodal Gemma 3 files leave out most of their text model.
_DEFAULTS = {
    "gemma2": {
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    "llama": {
        "max_position_embeddings": 2048,
        "pad_token_id": -1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
}
_NULL_MEANS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Settings that have one value here; a file that leaves them out, or says null, means that value.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bidirectional_attention": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
# Keys that change nothing of what is computed from tokens to logits. Older transformers wrote many of generation here.
_HARMLESS = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "pretraining_tp"),
    *("_name_or_path", "name_or_path", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *(
        "cache_implementation",
        "hybrid_cache",
        "sliding_window_size",
        "_sliding_window_pattern",
        "id2label",
        "label2id",
        "tokenizer_class",
    ),
    *(
        "return_dict",
        "chunk_size_feed_forward",
        "max_length",
        "min_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
    ),
    *("typical_p", "num_beams", "num_beam_groups", "length_penalty", "repetition_penalty", "diversity_penalty"),
    *("num_return_sequences", "is_decoder", "hidden_act", "hidden_activation", "layer_types", "quantization_config"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "tie_word_embeddings", "text_config"),
}
GENERATION = "generation_config.json"
_SLIDING, _FULL = "sliding_attention", "full_attention"
_log = logging.getLogger(__name__)


def model_config_from_hf(directory: str | Path) -> ModelConfig:
    """Read the ModelConfig of the Hugging Face model in `directory`; for a multimodal Gemma 3, that of its text model.

    Raises ConfigError for a missing or unreadable config.json, another model type, and every setting that would make
    the model compute something else (biases, an untied head in Gemma, another activation).
    """
    path = Path(directory) / "config.json"
    file = read_json(path)
    if file.get("model_type") == "gemma3":
        text = file.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError(f"{path}: text_config is missing; use the config.json that came with the weights")
        file = {"model_type": "gemma3_text", **{k: file[k] for k in _IDS if k in file}, **text}
    kind = file.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"{path}: model_type={kind!r} is not supported; use one of {', '.join(FAMILIES)} or gemma3")
    _check_fixed(file, path)
    ends = _ends(file, path.parent)
    tree = _settings(file | ({"eos_token_id": ends[0]} if ends else {})) | {"stop_token_ids": ends[1:]}
    missing = [key for key in _REQUIRED if tree.get(key) is None]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing; add it, as the tensors' shapes and the model's card say")
    tree |= _rope(file, tree, path) | _window(file, tree, path)
    _correct_query_scale(tree, path)
    try:
        return from_tree(ModelConfig, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _settings(file: dict) -> dict:
    """Return the file's settings, without the rotary ones, over what transformers assumes for those it leaves out."""
    kind = file["model_type"]
    tree = _DEFAULTS.get(kind, {}) | {"model_type": kind}
    # With the settings of other families: ModelConfig refuses those.
    optional = {key for family in FAMILIES.values() for key in family.may_set}
    for key in (*_REQUIRED, *_OPTIONAL, *optional):
        if file.get(key) is not None or (key in file and key in _NULL_MEANS_NONE):
            tree[key] = file[key]
    width, heads = file.get("hidden_size"), file.get("num_attention_heads")
    if kind == "llama" and "head_dim" not in tree and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        tree["head_dim"] = width // heads
    if kind == "llama" and heads is not None:
        tree.setdefault("num_key_value_heads", heads)  # as in files from before there were groups
    return tree


def _ends(file: dict, directory: Path) -> list[int]:
    """Return the tokens that end a text, first the one that ends a document; [] if the files name none.

    Of several, the tokenizer's eos ends a document, or the first where there is no tokenizer.
    """
    path = directory / GENERATION
    ends: list[int] = []
    for where, tree in ((directory / "config.json", file), (path, read_json(path) if path.is_file() else {})):
        value = tree.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            if where == path or isinstance(value, list):
                raise ConfigError(f"{where}: eos_token_id={value!r} must be token ids; correct it")
            return []  # ModelConfig says so
        if not ends and len(ids) > 1 and any((directory / name).is_file() for name in (JSON, MODEL)):
            own = Tokenizer(str(directory), key="").eos_id
            ids = sorted(ids, key=lambda i: i != own)
        ends += [i for i in ids if i not in ends]
    # generation_config.json alone does not say what ends a document.
    return ends if file.get("eos_token_id") is not None or not ends else _with_default(file, ends)


def _with_default(file: dict, ends: list[int]) -> list[int]:
    eos = _DEFAULTS.get(file["model_type"], {}).get("eos_token_id", ModelConfig.eos_token_id)
    return [eos, *(i for i in ends if i != eos)]


def _check_fixed(file: dict, path: Path):
    kind = file["model_type"]
    fixed = _FIXED if kind == "llama" else _FIXED | {"tie_word_embeddings": True}
    for key, wanted in fixed.items():
        if file.get(key) is not None and file[key] != wanted:
            raise ConfigError(f"{path}: {key}={file[key]!r} is not supported; a {kind} model here has {wanted}")
    if file.get("quantization_config") is not None:
        raise ConfigError(
            f"{path}: quantization_config: these weights are quantised; import the ones in bfloat16 or float32 that they were "
            "made from"
        )
    if file.get("auto_map"):
        raise ConfigError(f"{path}: auto_map names code of its own, which is not run here; use a model without it")
    wanted = FAMILIES[kind].activation
    # Gemma 1 was trained with the tanh form of GELU, and transformers too takes its published "gelu" for that.
    known = (None, wanted, "gelu") if kind == "gemma" else (None, wanted)
    for key in ("hidden_act", "hidden_activation"):
        if file.get(key) not in known:
            raise ConfigError(f"{path}: {key}={file[key]!r} is not supported; a {kind} model here has {wanted!r}")
    kinds = file.get("layer_types")
    if (
        "sliding_window" not in FAMILIES[kind].may_set
        and kinds is not None
        and (not isinstance(kinds, list) or any(layer != _FULL for layer in kinds))
    ):
        raise ConfigError(
            f"{path}: layer_types={kinds!r} is not supported; every layer of a {kind} model here is {_FULL!r}"
        )
    optional = {key for family in FAMILIES.values() for key in family.may_set}
    known = _HARMLESS | fixed.keys() | optional | {*_REQUIRED, *_OPTIONAL}
    unknown = [f"{key}={value!r}"[:80] for key, value in file.items() if key not in known and value]
    if unknown:
        _log.warning("%s: not known here and not taken into account: %s", path, ", ".join(unknown))


def _rope(file: dict, tree: dict, path: Path) -> dict:
    """Return the rotary settings, from `rope_theta` and its like (4.x) or `rope_parameters` (5.x); both must agree."""
    for key in ("rope_parameters", "rope_scaling"):
        for rope in (file.get(key) or {}, *(file.get(key) or {}).values()) if isinstance(file.get(key), dict) else ():
            if isinstance(rope, dict) and rope.get("partial_rotary_factor") not in (None, 1):
                raise ConfigError(
                    f"{path}: {key}: partial_rotary_factor is not supported; here all of a head is rotated"
                )
        if not isinstance(file.get(key), (dict, type(None))):
            raise ConfigError(f"{path}: {key}={file[key]!r} must be an object; download the file again")
    new = file.get("rope_parameters") or {}
    by_layer = _FULL in new or _SLIDING in new
    far, near = (new.get(_FULL) or {}, new.get(_SLIDING) or {}) if by_layer else (new, {})
    if _scaling(near):
        raise ConfigError(f"{path}: rope_parameters of {_SLIDING} are scaled, which is not supported")
    out = {}
    for key, old, value in (
        ("rope_theta", file.get("rope_theta"), far.get("rope_theta")),
        ("rope_local_base_freq", file.get("rope_local_base_freq"), near.get("rope_theta")),
        ("rope_scaling", _scaling(file.get("rope_scaling") or {}), _scaling(far)),
    ):
        written_twice = old is not None and (value is not None or (key == "rope_scaling" and far))
        if written_twice and old != value:
            raise ConfigError(f"{path}: {key}={old!r}, but rope_parameters has {value!r}; make them equal")
        chosen = old if old is not None else value
        out[key] = chosen if chosen is not None else tree.get(key, getattr(ModelConfig, key))
    return out


def _scaling(rope: dict) -> dict | None:
    """Return RopeScaling's fields of a `rope_scaling` or one entry of `rope_parameters`; None when nothing is scaled."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    rest = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
    return None if kind == "default" else {"rope_type": kind, **rest}


def _window(file: dict, tree: dict, path: Path) -> dict:
    """Return the sliding window and its pattern, from `layer_types` if the file has them."""
    kinds, pattern = file.get("layer_types"), tree.get("sliding_window_pattern", 1)
    if "sliding_window" not in FAMILIES[tree["model_type"]].may_set:
        return {}
    if kinds is not None:
        layers = len(kinds) if isinstance(kinds, list) else 0
        pattern = next((n for n in range(1, layers + 2) if kinds == _layer_types(layers, n)), None)
        if pattern is None or layers != tree["num_hidden_layers"]:
            raise ConfigError(
                f"{path}: layer_types is not, for each layer, {_FULL!r} in every n-th and {_SLIDING!r} in all others; "
                "no other pattern is supported"
            )
    window = tree["sliding_window"] if pattern != 1 else None
    return {"sliding_window": window, "sliding_window_pattern": pattern if window is not None else 1}


def _layer_types(layers: int, pattern: int) -> list[str]:
    return [_SLIDING if (i + 1) % pattern else _FULL for i in range(layers)]


def _correct_query_scale(tree: dict, path: Path):
    """Correct the 224 (hidden_size / heads) of early gemma-2-9b files: it was trained with 256 (google/gemma_pytorch)."""
    nine_b = {"model_type": "gemma2", "hidden_size": 3584, "num_attention_heads": 16, "head_dim": 256}
    if tree.get("query_pre_attn_scalar") == 224 and nine_b.items() <= tree.items():
        _log.warning("%s: query_pre_attn_scalar=224 is a mistake of early gemma-2-9b files; taken as 256", path)
        tree["query_pre_attn_scalar"] = 256


def hf_config(model: ModelConfig, dtype: str) -> dict:
    """Make the config.json for weights of `dtype` ("bfloat16" or "float32"), which transformers 4 and 5 read alike."""
    fields = {name: getattr(model, name) for name in (*_REQUIRED, *_OPTIONAL)}
    if model.pad_token_id < 0:
        fields["pad_token_id"] = None
    if model.stop_token_ids:
        fields["eos_token_id"] = [model.eos_token_id, *model.stop_token_ids]
    activation = model.family.activation
    return {
        "architectures": [_ARCHITECTURES[model.model_type]],
        "model_type": model.model_type,
        **fields,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "hidden_act": activation,
        "hidden_activation": activation,
        **_local_attention(model),
        **_written_rope(model),
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
    }


def _local_attention(model: ModelConfig) -> dict:
    if "sliding_window" not in model.family.may_set:
        return {}
    out = {
        "query_pre_attn_scalar": model.query_pre_attn_scalar or model.head_dim,
        "sliding_window": model.sliding_window,
        "layer_types": _layer_types(model.num_hidden_layers, model.sliding_window_pattern),
        "attn_logit_softcapping": model.attn_logit_softcapping,
        "final_logit_softcapping": model.final_logit_softcapping,
    }
    # Older transformers 4 have no layer_types: they read this for Gemma 3, and know only every second layer for Gemma 2.
    return out | {"sliding_window_pattern": model.sliding_window_pattern} if model.model_type == "gemma3_text" else out


def _written_rope(model: ModelConfig) -> dict:
    scaling = None
    if model.rope_scaling is not None:
        scaling = dataclasses.asdict(model.rope_scaling)
        if model.rope_scaling.rope_type == "linear":
            scaling = {key: scaling[key] for key in ("rope_type", "factor")}
    far = {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})}
    old = {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    if model.model_type != "gemma3_text":
        return old | {"rope_parameters": far}
    local = model.rope_local_base_freq or model.rope_theta
    near = {"rope_theta": local, "rope_type": "default"}
    return old | {"rope_local_base_freq": local, "rope_parameters": {_FULL: far, _SLIDING: near}}


def hf_generation_config(model: ModelConfig, kept: dict) -> dict:
    """Make the generation_config.json, without which a loader has to guess where a text ends.

    `kept` is the one that came with the model: its settings of sampling and the like stay, and the ids are the model's.
    """
    ids: dict = {name: getattr(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = [model.eos_token_id, *model.stop_token_ids]
    if len(ends) > 1:
        before = kept.get("eos_token_id")
        ids["eos_token_id"] = before if isinstance(before, list) and set(before) == set(ends) else ends
    return kept | {name: value for name, value in ids.items() if isinstance(value, list) or value >= 0}


def read_json(path: Path) -> dict:
    """Read a JSON object from a file; raises ConfigError if it is missing or anything else."""
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
    """Write a JSON object, indented."""
    path.write_bytes(orjson.dumps(tree, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
