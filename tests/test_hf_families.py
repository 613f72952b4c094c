"""What Mistral's, Qwen's and Llama's config.json may say: windows, rotary settings, missing keys, and what is refused."""

import json

import pytest
from hf_models import TINY
from hf_published import OTHERS, llama3, mistral, qwen2, qwen3
from transformers import AutoConfig

from easylm_mling.config import RopeScaling
from easylm_mling.errors import ConfigError
from easylm_mling.hf.config import hf_config, model_config_from_hf

SLIDING, FULL = "sliding_attention", "full_attention"
MISTRAL = mistral(vocab_size=32000, rope_theta=10000.0, sliding_window=4096)
QWEN2, QWEN3 = qwen2(28, 3584, 28, 4, 18944), qwen3(36, 4096, 32, 8, 12288)
LLAMA = llama3(32, 4096, 32, 8, 14336, factor=8.0)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return model_config_from_hf(folder)


REFUSED = {
    "model_type='mixtral' is a mixture of experts": MISTRAL | {"model_type": "mixtral", "num_local_experts": 8},
    "model_type='qwen3_moe' is a mixture of experts": QWEN3 | {"model_type": "qwen3_moe"},
    r"mixture of experts \(num_experts\)": QWEN2 | {"num_experts": 60},
    "model_type='qwen3_next' is not supported": QWEN3 | {"model_type": "qwen3_next"},
    "attention_bias=True is not supported": QWEN3 | {"attention_bias": True},
    "attention_bias=True is not supported; a mistral": MISTRAL | {"attention_bias": True},
    "attention_bias=True is not supported; a llama": LLAMA | {"attention_bias": True},
    "attention_bias=False is not supported; a qwen2": QWEN2 | {"attention_bias": False},
    "mlp_bias=True is not supported": LLAMA | {"mlp_bias": True},
    "hidden_act='gelu' is not supported": QWEN2 | {"hidden_act": "gelu"},
    "use_bidirectional_attention=True": QWEN3 | {"use_bidirectional_attention": True},
    "use_mrope=True": QWEN2 | {"use_mrope": True},
    "attention_dropout=0.1": MISTRAL | {"attention_dropout": 0.1},
    "quantization_config: these weights are quantised": QWEN2 | {"quantization_config": {"quant_method": "awq"}},
    "8 of 28 layers have a sliding window": QWEN2 | {"use_sliding_window": True, "max_window_layers": 20},
    "1 of 36 layers have a sliding window": QWEN3
    | {"use_sliding_window": True, "sliding_window": 64, "layer_types": [FULL] * 35 + [SLIDING]},
    "sliding_window=None contradict": QWEN3 | {"layer_types": [SLIDING] * 36},
    "use_sliding_window='no' must be true or false": QWEN2 | {"use_sliding_window": "no"},
    "sliding_window=4096 contradict": MISTRAL | {"layer_types": [FULL] * 32},
    "layer_types must be .* for each of the 32 layers": MISTRAL | {"layer_types": [SLIDING] * 31},
    "use_sliding_window=False does not exist in model_type='mistral'": MISTRAL | {"use_sliding_window": False},
    "use_sliding_window=True does not exist in model_type='llama'": LLAMA | {"use_sliding_window": True},
    "model.sliding_window=4096 does not exist in model_type='llama'": LLAMA | {"sliding_window": 4096},
    "attn_logit_softcapping=30.0 does not exist": MISTRAL | {"attn_logit_softcapping": 30.0},
    "rope_type='dynamic' must be one of": LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope_type='mrope' must be one of": QWEN2 | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
    "low_freq_factor is missing in the rotary scaling 'llama3'": LLAMA
    | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
    "factor is missing in the rotary scaling 'yarn'": QWEN2 | {"rope_scaling": {"rope_type": "yarn"}},
    "original_max_position_embeddings=8, but": QWEN2 | {"rope_scaling": YARN, "original_max_position_embeddings": 8},
    "must be numbers": QWEN2 | {"rope_scaling": YARN | {"factor": "4"}},
    "partial_rotary_factor": QWEN2 | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "beta_slow must be positive and less": QWEN2 | {"rope_scaling": YARN | {"beta_fast": 1.0}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_another_model_is_refused_by_name(tmp_path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, REFUSED[message])
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_is_every_layers_or_none(tmp_path):
    """Which layers have one, as transformers says it, from the file and from ours."""
    whole = {"use_sliding_window": True, "sliding_window": 64}
    for config, window in (
        (MISTRAL, 4096),
        ({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, 4096),
        (MISTRAL | {"sliding_window": None}, None),
        (QWEN2, None),
        (QWEN2 | whole, None),  # max_window_layers is the number of layers
        (QWEN2 | whole | {"max_window_layers": 0}, 64),
        (QWEN3 | whole | {"layer_types": [SLIDING] * 36}, 64),
        (QWEN3 | whole | {"layer_types": [FULL] * 36}, None),
    ):
        model = read(tmp_path, config)
        assert model.sliding_window == window and set(model.local_layers) == {window is not None}
        theirs = AutoConfig.for_model(**hf_config(model, "float32"))
        assert theirs.sliding_window == window
        if hasattr(theirs, "layer_types"):
            assert theirs.layer_types == AutoConfig.for_model(**config).layer_types
        assert read(tmp_path, hf_config(model, "float32")) == model


def test_both_dialects_of_yarn_are_one(tmp_path, caplog):
    expected = RopeScaling("yarn", 4.0, original_max_position_embeddings=32768)
    new = {"rope_type": "yarn", "rope_theta": 1e6, **{k: v for k, v in YARN.items() if k != "type"}}
    for more in ({"rope_scaling": YARN}, {"rope_parameters": new}, {"rope_scaling": YARN, "rope_parameters": new}):
        assert read(tmp_path, QWEN2 | more).rope_scaling == expected
    assert "transformers 4 divides" not in caplog.text
    # As Qwen's own cards tell people to write it: transformers 4.57 takes 1 for the factor then.
    assert read(tmp_path, QWEN2 | {"rope_scaling": YARN, "max_position_embeddings": 32768}).rope_scaling == expected
    assert "factor=4.0" in caplog.text and "transformers 4 divides the two lengths" in caplog.text


def test_the_length_of_the_first_training_is_where_transformers_looks_for_it(tmp_path):
    bare = {"rope_type": "yarn", "factor": 4.0}
    assert read(tmp_path, QWEN2 | {"rope_scaling": bare}).rope_scaling.original_max_position_embeddings == 131072
    model = read(tmp_path, QWEN2 | {"rope_scaling": bare, "original_max_position_embeddings": 4096})
    assert model.rope_scaling.original_max_position_embeddings == 4096


def test_mscale_is_the_attention_factor_it_stands_for(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for more in ({"mscale": 1.0, "mscale_all_dim": 0.5}, {"mscale": 0.7}, {"attention_factor": 1.25}, {}):
        config = QWEN2 | {"rope_scaling": YARN | more}
        _, factor = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**config), "cpu")
        assert read(tmp_path, config).rope_scaling.magnitude == pytest.approx(factor, rel=1e-12)


def test_what_a_file_leaves_out_is_what_transformers_assumes(tmp_path):
    shape = {k: v for k, v in TINY.items() if k != "head_dim"} | {"num_attention_heads": 32, "hidden_size": 1024}
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        ours, theirs = read(tmp_path, shape | {"model_type": kind}), AutoConfig.for_model(kind, **shape)
        names = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
        for name in names:
            assert getattr(ours, name) == getattr(theirs, name), (kind, name)
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(ours, name) == (-1 if getattr(theirs, name) is None else getattr(theirs, name)), (kind, name)
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)


def test_every_published_config_reads_the_same_from_the_newer_dialect(tmp_path):
    for name, (_, published) in OTHERS.items():
        scaling = published.get("rope_scaling") or {"rope_type": "default"}
        rope = {"rope_theta": published.get("rope_theta", 10000.0), **scaling}
        new = {k: v for k, v in published.items() if k not in ("rope_theta", "rope_scaling")} | {
            "rope_parameters": rope
        }
        assert read(tmp_path, new) == read(tmp_path, published), name
