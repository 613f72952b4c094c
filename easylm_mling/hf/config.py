"""Read and write `config.json` of every family, in the dialects of transformers 4 and 5.

Source: transformers 5.23 `configuration_gemma.py`, `configuration_gemma2.py`, `configuration_gemma3.py`,
`configuration_llama.py`, `configuration_mistral.py`, `configuration_qwen2.py` and `configuration_qwen3.py`; 4.x names are
those of the published configs. What is rotary or about windows is in hf/rotary.py and hf/windows.py.
"""

import logging
from pathlib import Path

from easylm_mling.config import FAMILIES, ModelConfig, from_tree
from easylm_mling.errors import ConfigError
from easylm_mling.hf.gemma4 import DEFAULTS as GEMMA_4
from easylm_mling.hf.gemma4 import check_gemma4, read_heads, written_heads
from easylm_mling.hf.generation_config import text_ends
from easylm_mling.hf.json_files import read_json
from easylm_mling.hf.rotary import read_rope, written_rope
from easylm_mling.hf.windows import read_window, written_window

_SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
_REQUIRED = (*_SHAPES, "num_attention_heads", "num_key_value_heads")
_IDS = ("pad_token_id", "eos_token_id", "bos_token_id")
# Where a file leaves one of these out, transformers assumes ModelConfig's default.
_OPTIONAL = ("max_position_embeddings", "rms_norm_eps", "initializer_range", *_IDS)
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "pad_token_id": -1,
    "bos_token_id": -1,
    "eos_token_id": -1,
    "tie_word_embeddings": False,
}
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
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "pad_token_id": -1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    **GEMMA_4,
}
# A multimodal file holds the settings of its text model, which are of this model_type.
_TEXT_OF = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
# Their head_dim is the width over the number of heads.
_DIVIDED_WIDTH = ("llama", "mistral", "qwen2")
_NULL_MEANS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Settings that have one value here; a file that leaves them out, or says null, means that value.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_mrope": False,
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
    *("use_sliding_window", "max_window_layers", "original_max_position_embeddings", "per_layer_config"),
    *("vocab_size_per_layer_input", "use_bidirectional_attention", "top_k_experts"),
}
# Any of these makes a mixture of experts of a config, whatever its model_type.
_EXPERTS = ("enable_moe_block", "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_log = logging.getLogger(__name__)


def model_config_from_hf(directory: str | Path) -> ModelConfig:
    """Read the ModelConfig of the Hugging Face model in `directory`; for a multimodal Gemma, that of its text model.

    Raises ConfigError for a missing or unreadable config.json, another model type, and every setting that would make
    the model compute something else (biases, an untied head in Gemma, another activation).
    """
    path = Path(directory) / "config.json"
    file = read_json(path)
    if file.get("model_type") in _TEXT_OF:
        text = file.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError(f"{path}: text_config is missing; use the config.json that came with the weights")
        outer = {k: file[k] for k in (*_IDS, "quantization_config") if k in file}
        file = {"model_type": _TEXT_OF[file["model_type"]], **outer, **text}
    kind = file.get("model_type")
    experts = [key for key in _EXPERTS if file.get(key)]
    if experts or "moe" in str(kind):
        raise ConfigError(
            f"{path}: model_type={kind!r} is a mixture of experts ({', '.join(experts) or 'by its name'}), which is not "
            "supported; use a dense model"
        )
    if kind not in FAMILIES:
        raise ConfigError(
            f"{path}: model_type={kind!r} is not supported; use one of {', '.join((*FAMILIES, *_TEXT_OF))}"
        )
    _check_fixed(file, path)
    default = _DEFAULTS.get(kind, {}).get("eos_token_id", ModelConfig.eos_token_id)
    ends = text_ends(file, path.parent, default)
    tree = _settings(file | ({"eos_token_id": ends[0]} if ends else {})) | {"stop_token_ids": ends[1:]}
    missing = [key for key in _REQUIRED if tree.get(key) is None]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing; add it, as the tensors' shapes and the model's card say")
    tree |= read_rope(file, tree, path) | read_window(file, tree, path) | read_heads(file, tree, path)
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
    if (
        kind in _DIVIDED_WIDTH
        and "head_dim" not in tree
        and isinstance(width, int)
        and isinstance(heads, int)
        and heads > 0
    ):
        tree["head_dim"] = width // heads
    if not kind.startswith("gemma") and heads is not None:
        if "num_key_value_heads" in file and file["num_key_value_heads"] is None:
            tree["num_key_value_heads"] = heads
        tree.setdefault("num_key_value_heads", heads)  # as in files from before there were groups
    return tree


def _check_fixed(file: dict, path: Path):
    kind = file["model_type"]
    fixed = _FIXED | {"attention_bias": FAMILIES[kind].qkv_bias}
    if FAMILIES[kind].gemma4:
        check_gemma4(file, path)
    else:
        fixed |= {"use_bidirectional_attention": False}
    if "tie_word_embeddings" not in FAMILIES[kind].may_set:
        fixed |= {"tie_word_embeddings": True}
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
    optional = {key for family in FAMILIES.values() for key in family.may_set}
    known = _HARMLESS | fixed.keys() | optional | {*_REQUIRED, *_OPTIONAL}
    unknown = [f"{key}={value!r}"[:80] for key, value in file.items() if key not in known and value]
    if unknown:
        _log.warning("%s: not known here and not taken into account: %s", path, ", ".join(unknown))


def _correct_query_scale(tree: dict, path: Path):
    """Correct the 224 (hidden_size / heads) of early gemma-2-9b files: it was trained with 256 (google/gemma_pytorch)."""
    nine_b = {"model_type": "gemma2", "hidden_size": 3584, "num_attention_heads": 16, "head_dim": 256}
    if tree.get("query_pre_attn_scalar") == 224 and nine_b.items() <= tree.items():
        _log.warning("%s: query_pre_attn_scalar=224 is a mistake of early gemma-2-9b files; taken as 256", path)
        tree["query_pre_attn_scalar"] = 256


def hf_config(model: ModelConfig, dtype: str) -> dict:
    """Make the config.json for weights of `dtype` ("bfloat16" or "float32"), which transformers 4 and 5 read alike."""
    fields = {name: getattr(model, name) for name in (*_REQUIRED, *_OPTIONAL)}
    fields |= {name: None for name in _IDS if fields[name] < 0}
    if model.stop_token_ids:
        fields["eos_token_id"] = [model.eos_token_id, *model.stop_token_ids]
    activation = model.family.activation
    return {
        "architectures": [_ARCHITECTURES[model.model_type]],
        "model_type": model.model_type,
        **fields,
        **({} if model.family.qkv_bias else {"attention_bias": False}),  # transformers has no such key there
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "hidden_act": activation,
        "hidden_activation": activation,
        **_caps(model),
        **written_heads(model),
        **written_window(model),
        **written_rope(model),
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
    }


def _caps(model: ModelConfig) -> dict:
    may_set = model.family.may_set
    if "query_pre_attn_scalar" not in may_set:
        return {name: getattr(model, name) for name in ("final_logit_softcapping",) if name in may_set}
    caps = {name: getattr(model, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    return {"query_pre_attn_scalar": model.query_pre_attn_scalar or model.head_dim} | caps
