"""Tiny random models of transformers, their files, and both sides' logits: what the tests of hf/ share."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from data_corpus import tokenizer_path
from flax import nnx
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from easylm_mling.config import MeshConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hf.config import model_config_from_hf
from easylm_mling.hf.importing import import_hf, open_weights, read_params
from easylm_mling.model.decoder import ForwardOptions, logits
from easylm_mling.model.sharding import make_mesh
from easylm_mling.training.state import model_graph

TINY = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, head_dim=32)
HEADS = [(4, 4), (4, 2), (4, 1)]
INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"

# Each family with its traps on: windows shorter than the texts of the tests, a query scale that is not head_dim's,
# caps that bite, two rotary bases, scaled frequencies.
LOCAL = {"sliding_window": 9, "query_pre_attn_scalar": 24, "num_hidden_layers": 4}
NEAR = {"rope_type": "default", "rope_theta": 10_000.0}
FAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
}
OTHER_YARN = YARN_ROPE | {
    "original_max_position_embeddings": 256,
    "beta_fast": 8.0,
    "beta_slow": 2.0,
    "attention_factor": 1.5,
    "truncate": False,
}
GEMMA_4 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 9,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 2.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        "sliding_attention": NEAR,
    },
}
FAR_BASE = {"rope_type": "default", "rope_theta": 1_000_000.0}
FAMILIES = {
    "gemma": (GemmaConfig, GemmaForCausalLM, {"rope_parameters": NEAR}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        LOCAL | {"rope_parameters": NEAR, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        LOCAL | {"sliding_window_pattern": 3, "rope_parameters": {"full_attention": FAR, "sliding_attention": NEAR}},
    ),
    "gemma4": (Gemma4TextConfig, Gemma4ForCausalLM, GEMMA_4 | {"hidden_size_per_layer_input": 0}),
    # The small ones: embeddings of each layer, keys and values that the last layers share, and a wider MLP in those.
    "gemma4_small": (
        Gemma4TextConfig,
        Gemma4ForCausalLM,
        GEMMA_4
        | {
            "num_hidden_layers": 9,
            "layer_types": GEMMA_4["layer_types"][:3] * 3,
            "attention_k_eq_v": False,
            "num_global_key_value_heads": None,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": TINY["vocab_size"],
        },
    ),
    "gemma4_unified": (Gemma4UnifiedTextConfig, Gemma4UnifiedForCausalLM, GEMMA_4),
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": NEAR, "tie_word_embeddings": False}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ),
    "llama_linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": FAR}),
    "mistral": (MistralConfig, MistralForCausalLM, {"rope_parameters": NEAR, "sliding_window": 9}),
    # Scaled frequencies in layers that are all local.
    "mistral_yarn": (MistralConfig, MistralForCausalLM, {"rope_parameters": YARN_ROPE, "sliding_window": 9}),
    "mistral_global": (MistralConfig, MistralForCausalLM, {"rope_parameters": NEAR, "sliding_window": None}),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        # The window is there, and switched off.
        {"rope_parameters": FAR_BASE, "sliding_window": 9, "max_window_layers": 2, "head_dim": 16},
    ),
    "qwen2_yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"rope_parameters": FAR_BASE, "tie_word_embeddings": True}),
    "qwen3_window": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"rope_parameters": OTHER_YARN, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
}
# Families whose norms multiply by their weights alone.
ONES = ("llama", "mistral", "qwen", "gemma4")


def transformers_model(heads=4, kv_heads=2, dtype=torch.float32, family="gemma", kernels=0.05, embedding=0.05, **other):
    """A random model of transformers; `kernels` and `embedding` are standard deviations, `other` settings of its config."""
    config_class, model_class, settings = FAMILIES[family]
    shape = TINY | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 512}
    config = config_class(**shape | settings | other)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = "norm" in name or "bias" in name
            p.normal_(0, 0.1 if wide else embedding if "embed" in name else kernels)
            if "norm" in name and family.startswith(ONES):
                p += 1
            if family.startswith("gemma4") and ("q_norm" in name or "k_norm" in name):
                p *= 0.4  # they carry the scale of the scores
        for name, b in model.named_buffers():
            if "layer_scalar" in name:
                b.uniform_(0.5, 1.5)
    return model.to(dtype)


def save(model, directory: Path, **settings) -> Path:
    model.save_pretrained(directory, **settings)
    shutil.copy(tokenizer_path(), directory / "tokenizer.model")
    (directory / "tokenizer_config.json").write_text('{"add_bos_token":   true}\r\n')
    return directory


def raw_tensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor, read from the files without any library."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        blob = path.read_bytes()
        length = int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                assert name not in tensors
                tensors[name] = (entry["dtype"], entry["shape"], blob[8 + length + start : 8 + length + stop])
    return tensors


def any_finite_bits(model, seed=0):
    """Fill a model with random bit patterns: every exponent, subnormals and both zeros, but no infinity or NaN."""
    generator = np.random.default_rng(seed)
    for p in model.parameters():
        width = np.uint32 if p.dtype == torch.float32 else np.uint16
        bits = generator.integers(0, np.iinfo(width).max, p.shape, width, endpoint=True)
        bits.reshape(-1)[:2] = 0, 1 << (8 * bits.itemsize - 1)
        values = torch.from_numpy(bits).view(p.dtype)
        p.data = torch.where(torch.isfinite(values), values, torch.ones_like(values))
    return model


def our_logits(directory: Path, tokens: np.ndarray, dtype, change: dict | None = None) -> np.ndarray:
    """Logits of the model in `directory`, with some fields of its config changed."""
    model = dataclasses.replace(model_config_from_hf(directory), **change or {})
    params = read_params(open_weights(directory, model), model, make_mesh(MeshConfig(), jax.devices()[:1]))
    gemma = nnx.merge(model_graph(model), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = gemma(jnp.asarray(tokens), positions, jnp.ones(tokens.shape, jnp.int32), ForwardOptions(dtype))
    return np.asarray(logits(hidden, gemma.head, model.final_logit_softcapping))


def their_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def refuses(directory: Path, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        import_hf(directory, directory.parent / "checkpoint")
    assert "\n" not in str(caught.value) and not (directory.parent / "checkpoint").exists()
