"""config.json: what is read, what is refused, and both dialects out."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from hf_models import FAMILIES, FAR, NEAR, TINY, save, transformers_model
from hf_published import OTHERS
from transformers import AutoConfig

from easylm_mling.config import ModelConfig, from_tree
from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.errors import ConfigError
from easylm_mling.hf.config import hf_config, model_config_from_hf
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.generation_config import hf_generation_config
from easylm_mling.hf.importing import import_hf
from easylm_mling.model.params import parameter_count


def test_config_speaks_both_dialects(hf_source, imported, tmp_path):
    export_hf(imported, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 10_000.0 and written["rope_parameters"]["rope_theta"] == 10_000.0
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert (
        written["hidden_act"] == written["hidden_activation"] == "gelu_pytorch_tanh" and written["rope_scaling"] is None
    )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1
    theirs = json.loads((hf_source / "config.json").read_text())
    assert {k: written[k] for k in theirs.keys() & written.keys()} == {
        k: theirs[k] for k in theirs.keys() & written.keys()
    }
    model = model_config_from_hf(hf_source)
    for drop in (["rope_parameters", "dtype"], ["rope_theta", "rope_scaling", "torch_dtype"], ["hidden_act"]):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k not in drop}))
        assert model_config_from_hf(tmp_path) == model


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_both_dialects_of_the_rotary_base_are_read(tmp_path, theta):
    written = hf_config(ModelConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, rope_theta=theta), "float32")
    for drop in ("rope_parameters", "rope_theta"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k != drop}))
        assert model_config_from_hf(tmp_path).rope_theta == theta


CONFIG_FAULTS = {
    "model_type='mamba'": {"model_type": "mamba"},
    "attention_bias=True": {"attention_bias": True},
    "tie_word_embeddings=False": {"tie_word_embeddings": False},
    "hidden_activation='relu'": {"hidden_activation": "relu"},
    "use_bidirectional_attention=True": {"use_bidirectional_attention": True},
    "rope_scaling=.* does not exist in model_type='gemma'": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": None,
    },
    "model.rope_scaling=": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    "rope_scaling=.*but rope_parameters": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "rope_theta=5.0, but": {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}},
    "head_dim is missing": {"head_dim": None},
    "hidden_size='wide'": {"hidden_size": "wide"},
    r"eos_token_id=\[1, 'x'\] must be token ids": {"eos_token_id": [1, "x"]},
    "quantization_config: these weights are quantised": {"quantization_config": {"quant_method": "gptq"}},
    "auto_map names code": {"auto_map": {"AutoModelForCausalLM": "x.Y"}},
    "attention_dropout=0.1 is not supported": {"attention_dropout": 0.1},
    "partial_rotary_factor=0.5 is not supported": {"partial_rotary_factor": 0.5},
    "rope_parameters: partial_rotary_factor is not supported": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    },
    "rope_scaling='linear' must be an object": {"rope_scaling": "linear"},
    "is_causal=False is not supported": {"is_causal": False},
    "layer_types=.* is not supported": {"layer_types": ["sliding_attention"]},
    "num_attention_heads=4 must be a multiple": {"num_key_value_heads": 3},
}


@pytest.mark.parametrize("message", CONFIG_FAULTS)
def test_a_config_of_another_model_is_refused(hf_source, tmp_path, message):
    config = json.loads((hf_source / "config.json").read_text()) | CONFIG_FAULTS[message]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as caught:
        import_hf(tmp_path, tmp_path / "checkpoint")
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="config.json: no such file"):
        import_hf(tmp_path, tmp_path / "checkpoint")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json: "):
        import_hf(tmp_path, tmp_path / "checkpoint")


# config.json in the form that the hub publishes. Multimodal files name only what differs from transformers' defaults.
LINEAR = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}


def gemma(architecture, version, shape, more):
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    common = {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "torch_dtype": "bfloat16",
        "transformers_version": version,
        "use_cache": True,
    }
    return common | dict(zip(names, shape, strict=True)) | more


def gemma1(*shape, **more):
    """`hidden_act` says gelu, but the model was trained with its tanh form, and transformers reads it as that."""
    theirs = {"model_type": "gemma", "vocab_size": 256000, "head_dim": 256, "hidden_act": "gelu"}
    theirs |= {"max_position_embeddings": 8192, "rope_scaling": None, "rope_theta": 10000.0}
    return gemma("GemmaForCausalLM", "4.38.0.dev0", shape, theirs | more)


def gemma2(*shape, head_dim=256, query=256):
    theirs = {"model_type": "gemma2", "vocab_size": 256000, "head_dim": head_dim, "query_pre_attn_scalar": query}
    theirs |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    theirs |= {"max_position_embeddings": 8192, "rope_theta": 10000.0, "cache_implementation": "hybrid"}
    theirs |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    theirs |= {"sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32"}
    return gemma("Gemma2ForCausalLM", "4.42.0.dev0", shape, theirs)


def gemma3_text(*shape, **more):
    theirs = {"model_type": "gemma3_text", "vocab_size": 262144, "head_dim": 256, "max_position_embeddings": 32768}
    theirs |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 512}
    theirs |= {"attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"}
    theirs |= {"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000}
    return gemma("Gemma3ForCausalLM", "4.50.0.dev0", shape, theirs | more)


def gemma3(**text):
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16}
    vision |= {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "sliding_window": 1024} | LINEAR | text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": vision,
    }


def gemma4(kind, *shape, period=6, **text):
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    text |= {"attention_bias": False, "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256}
    text |= {"enable_moe_block": False, "num_experts": None, "top_k_experts": None}
    text = {"attention_k_eq_v": True, "max_position_embeddings": 262144, "sliding_window": 1024} | text
    text |= {"use_bidirectional_attention": "vision"}
    if kind == "gemma4":
        text = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 262144} | text
    text = {"num_kv_shared_layers": 0} | text
    text |= {"vocab_size": 262144, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
    text |= {"layer_types": (["sliding_attention"] * (period - 1) + ["full_attention"]) * (shape[0] // period)}
    text |= {"rope_parameters": {"sliding_attention": NEAR, "full_attention": PROPORTIONAL}}
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": kind,
        "eos_token_id": [1, 106],
        "image_token_id": 258880,
        "text_config": {"model_type": f"{kind}_text"} | dict(zip(names, shape, strict=True)) | text,
        "tie_word_embeddings": True,
        "vision_config": {"model_type": f"{kind}_vision"},
        "dtype": "bfloat16",
    }


def gemma4_small(*shape, **text):
    text |= {"attention_k_eq_v": False, "max_position_embeddings": 131072, "sliding_window": 512}
    return gemma4("gemma4", *shape, hidden_size_per_layer_input=256, **text)


PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25}
PUBLISHED = {
    # With one number for each layer's scalar, which transformers has as a buffer and does not count.
    "gemma-4-e2b": (
        4_628_569_344 + 35,
        gemma4_small(35, 1536, 8, 1, 6144, period=5, num_kv_shared_layers=20, use_double_wide_mlp=True),
    ),
    "gemma-4-e4b": (7_463_013_376 + 42, gemma4_small(42, 2560, 8, 2, 10240, num_kv_shared_layers=18)),
    "gemma-4-12b": (
        11_907_350_272 + 48,
        gemma4("gemma4_unified", 48, 3840, 16, 8, 15360, num_global_key_value_heads=1),
    ),
    "gemma-4-31b": (
        30_697_345_280 + 60,
        gemma4("gemma4", 60, 5376, 32, 16, 21504, num_global_key_value_heads=4),
    ),
    "gemma-2b": (2_506_172_416, gemma1(18, 2048, 8, 1, 16384)),
    "gemma-7b": (8_537_680_896, gemma1(28, 3072, 16, 16, 24576, hidden_activation=None)),
    "gemma-2-2b": (2_614_341_888, gemma2(26, 2304, 8, 4, 9216)),
    "gemma-2-9b": (9_241_705_984, gemma2(42, 3584, 16, 8, 14336)),
    "gemma-2-27b": (27_227_128_320, gemma2(46, 4608, 32, 16, 36864, head_dim=128, query=144)),
    "gemma-3-270m": (
        268_098_176,
        gemma3_text(
            18,
            640,
            4,
            1,
            2048,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
            _sliding_window_pattern=6,
            use_bidirectional_attention=False,
        ),
    ),
    "gemma-3-1b": (999_885_952, gemma3_text(26, 1152, 4, 1, 6912, sliding_window_pattern=6)),
    "gemma-3-4b": (3_880_263_168, gemma3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)),
    "gemma-3-12b": (
        11_766_034_176,
        gemma3(
            hidden_size=3840,
            intermediate_size=15360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
        ),
    ),
    "gemma-3-27b": (
        27_009_346_304,
        gemma3(
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=168,
        ),
    ),
}
PUBLISHED |= OTHERS
SIZES = Path(__file__).parent.parent / "configs" / "model"


def test_every_size_is_here():
    assert {p.stem for p in SIZES.iterdir()} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configs_are_ours_with_their_parameter_counts(name, tmp_path):
    count, published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    model = model_config_from_hf(tmp_path)
    ours = from_tree(ModelConfig, read_yaml((SIZES / f"{name}.yaml").read_bytes())["model"])
    explicit = {"query_pre_attn_scalar": model.query_pre_attn_scalar}
    assert dataclasses.replace(ours, **explicit) == model and ours.query_scale == model.query_scale
    assert parameter_count(model) == count
    assert f"{count:,} parameters" in (SIZES / f"{name}.yaml").read_text()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, "bfloat16")))
    assert model_config_from_hf(tmp_path) == model


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_understands_both_dialects_of_ours_as_the_published(name, tmp_path):
    """What transformers computes with, from the published file, from ours, and from each dialect of ours alone."""
    published = PUBLISHED[name][1]
    text = published.get("text_config", published)
    ours = read_yaml((SIZES / f"{name}.yaml").read_bytes())["model"]
    written = hf_config(from_tree(ModelConfig, ours), "bfloat16")
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
    # Gemma 4 is younger than the older dialect.
    gone = () if "gemma-4" in name else ("rope_parameters", "layer_types")
    old = {k: v for k, v in written.items() if k not in gone}
    names = ("rope_parameters", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    names += (
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "num_kv_shared_layers",
        "attention_k_eq_v",
    )
    names += ("hidden_size_per_layer_input", "use_double_wide_mlp")
    heads = ("head_dim", "num_key_value_heads")

    def read(tree):
        config = AutoConfig.for_model(**tree)
        # The older of our dialects names no layer types, and transformers 5 makes them up from the window.
        values = {n: getattr(config, n, None) for n in (*names, "layer_types", "sliding_window")}
        layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
        for n in heads:
            values[n] = [
                getattr(layer, n, None) or config.hidden_size // config.num_attention_heads for layer in layers
            ]
        return values

    expected = read(text)
    assert read(written) == read(new) == read(old) == expected


def test_the_wrong_query_scale_of_early_9b_files_is_corrected(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-2-9b"][1] | {"query_pre_attn_scalar": 224}))
    assert model_config_from_hf(tmp_path).query_pre_attn_scalar == 256
    assert "query_pre_attn_scalar=224" in caplog.text
    # Any other model is believed.
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-2-2b"][1] | {"query_pre_attn_scalar": 224}))
    assert model_config_from_hf(tmp_path).query_pre_attn_scalar == 224


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_out_and_in_again(family, tmp_path):
    source = save(transformers_model(family=family), tmp_path / "source")
    model = model_config_from_hf(source)
    written = hf_config(model, "float32")
    old = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
    for tree in (written, old, new):
        (tmp_path / "config.json").write_text(json.dumps(tree))
        assert model_config_from_hf(tmp_path) == model
    theirs = json.loads((source / "config.json").read_text())
    shared = theirs.keys() & written.keys() - {"sliding_window_pattern"}
    assert {k: written[k] for k in shared} == {k: theirs[k] for k in shared}


LOCAL_FAULTS = {
    "layer_types is not": {"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]},
    "layer_types is not, ": {"layer_types": ["sliding_attention", "full_attention"]},
    "rope_parameters of sliding_attention are scaled": {
        "rope_parameters": {"sliding_attention": FAR, "full_attention": FAR}
    },
    "rope_local_base_freq=5, but rope_parameters has 10000.0": {"rope_local_base_freq": 5},
    "attn_logit_softcapping=50.0 does not exist in model_type='gemma3_text'": {"attn_logit_softcapping": 50.0},
    "rope_type must be 'linear' in model_type='gemma3_text'": {
        "rope_parameters": {"full_attention": FAR | {"rope_type": "yarn"}, "sliding_attention": NEAR}
    },
    "rope_type='dynamic' must be one of 'linear', 'llama3', 'yarn'": {
        "rope_parameters": {"full_attention": FAR | {"rope_type": "dynamic"}, "sliding_attention": NEAR}
    },
}


@pytest.mark.parametrize("message", LOCAL_FAULTS)
def test_a_gemma_3_that_is_none_is_refused(tmp_path, message):
    transformers_model(family="gemma3_text").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | LOCAL_FAULTS[message]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as caught:
        model_config_from_hf(tmp_path)
    assert "\n" not in str(caught.value)


HEADS_OF_5 = {"head_dim": 64, "num_key_value_heads": 1}
GEMMA_4_FAULTS = {
    "model_type='gemma4_text' is a mixture of experts .enable_moe_block, num_experts, moe_intermediate_size.": {
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "use_bidirectional_attention='all' is not supported": {"use_bidirectional_attention": "all"},
    "per_layer_config must give every full_attention layer": {"per_layer_config": {"5": HEADS_OF_5}},
    "per_layer_config must give every full_attention layer ": {
        "per_layer_config": {"2": HEADS_OF_5, "5": HEADS_OF_5 | {"head_dim": 32}}
    },
    "per_layer_config must give every full_attention  *": {
        "per_layer_config": {i: HEADS_OF_5 | {"num_attention_heads": 2} for i in "25"}
    },
    "global_head_dim=512, but per_layer_config has 64": {"global_head_dim": 512},
    "needs attention_k_eq_v": {"attention_k_eq_v": False},
    "must be a multiple of model.sliding_window_pattern=3": {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2,
        "per_layer_config": {"2": HEADS_OF_5},
    },
    "rope_type is 'proportional' in Gemma 4": {
        "rope_parameters": {"full_attention": FAR, "sliding_attention": NEAR},
    },
    "attention_bias=True is not supported": {"attention_bias": True},
    "num_kv_shared_layers=3 must leave": {"num_kv_shared_layers": 3},
    "vocab_size_per_layer_input=262144 is not supported": {"hidden_size_per_layer_input": 16},
}


@pytest.mark.parametrize("message", GEMMA_4_FAULTS)
def test_a_gemma_4_that_is_another_is_refused(tmp_path, message):
    transformers_model(family="gemma4").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["per_layer_config"] == {"2": HEADS_OF_5, "5": HEADS_OF_5}
    with pytest.raises(ConfigError, match=message) as caught:
        written(tmp_path, config=config | GEMMA_4_FAULTS[message])
    assert "\n" not in str(caught.value)


def test_both_forms_of_gemma_4_heads_are_one(tmp_path):
    transformers_model(family="gemma4").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model = model_config_from_hf(tmp_path)
    assert (model.global_head_dim, model.num_global_key_value_heads) == (64, 1)
    del config["per_layer_config"]
    assert written(tmp_path, config=config | {"global_head_dim": 64, "num_global_key_value_heads": 1}) == model
    # What transformers assumes, and what it passes over.
    assert written(tmp_path, config=config).global_head_dim == 512
    passed_over = {"attention_k_eq_v": False, "num_global_key_value_heads": 1}
    assert written(tmp_path, config=config | passed_over).num_global_key_value_heads is None


def written(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return model_config_from_hf(folder)


def test_every_token_that_ends_a_text_is_kept(hf_source, tmp_path):
    config = json.loads((hf_source / "config.json").read_text())
    model = written(tmp_path, config=config | {"eos_token_id": [106, 1, 7]})
    assert (model.eos_token_id, model.stop_token_ids) == (106, (1, 7))
    # With a tokenizer, its eos is the one that ends a document.
    shutil.copy("data/sample/tokenizer/tokenizer.model", tmp_path)
    model = written(tmp_path, config=config | {"eos_token_id": [106, 1, 7]}, generation_config={"eos_token_id": [1, 9]})
    assert (model.eos_token_id, model.stop_token_ids) == (1, (106, 7, 9))
    again = written(tmp_path / "again", config=hf_config(model, "float32"))
    assert again == model
    kept = {"do_sample": True, "top_k": 64, "eos_token_id": [106, 1, 7, 9]}
    assert hf_generation_config(model, kept) == kept | {"bos_token_id": 2, "pad_token_id": 0}
    assert hf_generation_config(dataclasses.replace(model, stop_token_ids=()), kept)["eos_token_id"] == 1


def test_a_llama_without_key_value_heads_has_one_for_each_query_head(tmp_path):
    config = hf_config(from_tree(ModelConfig, LLAMA), "float32")
    del config["num_key_value_heads"]
    assert written(tmp_path, config=config).num_key_value_heads == LLAMA["num_attention_heads"]


def test_an_unknown_key_is_named(hf_source, tmp_path, caplog):
    written(
        tmp_path, config=json.loads((hf_source / "config.json").read_text()) | {"memory_layers": [3], "unset": None}
    )
    assert "not taken into account: memory_layers=[3]" in caplog.text and "unset" not in caplog.text


def test_no_published_config_has_an_unknown_key(tmp_path, caplog):
    for _, published in PUBLISHED.values():
        written(tmp_path, config=published)
    assert "not known here" not in caplog.text


LLAMA = TINY | {"num_attention_heads": 4, "num_key_value_heads": 4, "model_type": "llama"}
