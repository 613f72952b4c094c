"""The model is that of transformers, for every family with its traps on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import HEADS, TINY, our_logits, save, their_logits, transformers_model

from easylm_mling.config import RopeScaling

CASES = [("gemma", *heads) for heads in HEADS] + [
    ("gemma2", 4, 2),
    ("gemma2", 4, 1),
    ("gemma3_text", 4, 2),
    ("gemma3_text", 4, 4),
    ("gemma4", 4, 2),
    ("gemma4_small", 4, 2),
    ("gemma4_unified", 4, 4),
    ("llama", 4, 4),
    ("llama3", 4, 2),
    ("llama_linear", 4, 2),
    ("mistral", 4, 2),
    ("mistral_yarn", 4, 2),
    ("mistral_global", 4, 1),
    ("qwen2", 4, 2),
    ("qwen2_yarn", 4, 4),
    ("qwen3", 4, 2),
    ("qwen3_window", 4, 1),
]


@pytest.mark.parametrize("family, heads, kv_heads", CASES)
def test_logits_are_those_of_transformers(tmp_path, family, heads, kv_heads):
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 40))
    # Large kernels, so that scores are far from even and the caps and windows decide something.
    # With an untied head of that size, few key/value heads already double the rounding errors of both sides.
    theirs = transformers_model(heads, kv_heads, family=family, kernels=0.15 if "mistral" in family else 0.2)
    directory = save(theirs, tmp_path / "hf")
    with jax.default_matmul_precision("highest"):
        ours = our_logits(directory, tokens, jnp.float32)
    assert np.abs(ours - their_logits(theirs, tokens)).max() <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("family, heads, kv_heads", CASES)
def test_bfloat16_stays_close_to_transformers(tmp_path, family, heads, kv_heads):
    tokens = np.random.default_rng(1).integers(0, TINY["vocab_size"], (4, 64))
    theirs = transformers_model(heads, kv_heads, torch.bfloat16, family)
    directory = save(theirs, tmp_path / "hf")
    a = jax.nn.log_softmax(their_logits(theirs, tokens))
    b = jax.nn.log_softmax(our_logits(directory, tokens, jnp.bfloat16))
    divergence = np.sum(np.exp(a) * (a - b), axis=-1)
    assert divergence.mean() <= 5e-4 and divergence.max() <= 1e-2


# One setting of the config changed, and the logits move: each trap is on in the tests above.
TRAPS = {
    "gemma2": [
        {"sliding_window": 40},
        {"sliding_window_pattern": 3},
        {"query_pre_attn_scalar": 32},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
    ],
    "gemma3_text": [
        {"sliding_window": 10},
        {"rope_local_base_freq": 1_000_000.0},
        {"rope_theta": 10_000.0},
        {"rope_scaling": None},
        {"query_pre_attn_scalar": 32},
    ],
    "gemma4": [
        {"sliding_window": 10},
        {"rope_local_base_freq": 1_000_000.0},
        {"rope_theta": 10_000.0},
        {"rope_scaling": None},
        {"rope_scaling": RopeScaling("proportional", 1.0, partial_rotary_factor=0.5)},
        {"rope_scaling": RopeScaling("proportional", 4.0, partial_rotary_factor=0.25)},
        {"final_logit_softcapping": None},
    ],
    "llama3": [{"rope_scaling": None}, {"rope_scaling": RopeScaling("linear", 8.0)}],
    "mistral": [{"sliding_window": None}, {"sliding_window": 10}],
    "mistral_yarn": [
        {"sliding_window": None},
        {"rope_scaling": None},
        {"rope_scaling": RopeScaling("linear", 16.0)},
        {"rope_scaling": RopeScaling("yarn", 16.0, original_max_position_embeddings=64)},
        {"rope_scaling": RopeScaling("yarn", 16.0, original_max_position_embeddings=32, attention_factor=1.0)},
    ],
    "qwen2": [{"sliding_window": 9}, {"rope_theta": 10_000.0}],
    "qwen3": [{"sliding_window": 9}, {"rms_norm_eps": 1e-2}],
    "qwen3_window": [
        {"sliding_window": None},
        {"rope_scaling": RopeScaling("yarn", 16.0, 1.0, 4.0, 256, 8.0, 2.0, 1.5, truncate=True)},
        {"rope_scaling": RopeScaling("yarn", 16.0, 1.0, 4.0, 256, 32.0, 2.0, 1.5, truncate=False)},
        {"rope_scaling": RopeScaling("yarn", 16.0, 1.0, 4.0, 256, 8.0, 1.0, 1.5, truncate=False)},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAPS)
def test_every_trap_is_on(tmp_path, family):
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 40))
    directory = save(transformers_model(family=family, kernels=0.2), tmp_path / "hf")
    right = our_logits(directory, tokens, jnp.float32)
    for change in TRAPS[family]:
        wrong = our_logits(directory, tokens, jnp.float32, change)
        assert np.abs(wrong - right).max() > 1e-3, change
