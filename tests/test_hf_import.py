"""Import: sharded, exact, and nothing written for weights that do not fit."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import (
    GATE,
    INDEX,
    TINY,
    our_logits,
    refuses,
    save,
    their_logits,
    transformers_model,
)
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from easylm_mling.checkpoint.parameters import load_params
from easylm_mling.config import MeshConfig, ModelConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hf import importing
from easylm_mling.hf.config import model_config_from_hf
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf, open_weights, read_params, widest_mesh
from easylm_mling.hf.tensor_files import TensorFile
from easylm_mling.model.params import parameter_table, to_flat
from easylm_mling.model.sharding import make_mesh, parameter_shardings
from easylm_mling.training.state import abstract_params


def test_import_is_sharded_and_bit_equal_to_one_device(hf_source):
    model = model_config_from_hf(hf_source)
    weights = open_weights(hf_source, model)
    wide, one = widest_mesh(model), make_mesh(MeshConfig(), jax.devices()[:1])
    assert wide.shape["fsdp"] == 8 == jax.device_count()
    two_axes = make_mesh(MeshConfig(fsdp=2, tensor=4))
    expected = to_flat(read_params(weights, model, one))
    for mesh in (wide, two_axes):
        got = to_flat(read_params(weights, model, mesh))
        for p in parameter_table(model):
            assert got[p.path].sharding == to_flat(parameter_shardings(model, mesh))[p.path]
            assert np.array_equal(got[p.path], expected[p.path]), p.path
    shards = to_flat(read_params(weights, model, wide))["layers.mlp.gate_proj"].addressable_shards
    assert {s.data.shape for s in shards} == {(3, 128, 8)}


def test_import_uses_as_many_devices_as_divide():
    odd = ModelConfig(**TINY | {"hidden_size": 60}, num_attention_heads=4, num_key_value_heads=2)
    assert widest_mesh(odd).size == 6


def test_an_imported_checkpoint_restores_on_another_mesh(hf_source, imported):
    model = model_config_from_hf(hf_source)
    restored = to_flat(load_params(imported, abstract_params(model, make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)))))
    expected = to_flat(read_params(open_weights(hf_source, model), model, widest_mesh(model)))
    for path, values in expected.items():
        assert restored[path].dtype == jnp.float32 and np.array_equal(restored[path], values), path


def test_a_killed_import_leaves_nothing(hf_source, tmp_path, monkeypatch):
    def dies(*_):
        assert list((tmp_path).glob(".checkpoint.*.partial/checkpoints/0/params/*"))
        assert not (tmp_path / "checkpoint").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "copy_tokenizer", dies)
    with pytest.raises(KeyboardInterrupt):
        import_hf(hf_source, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(GATE), f"tensor {GATE} is missing from model.safetensors"),
        (
            lambda t: t.update({GATE: torch.zeros(128, 65)}),
            rf"{GATE} has shape \(128, 65\), but config.json says \(128, 64\)",
        ),
        (lambda t: t.update({GATE: torch.zeros(64, 128)}), rf"{GATE} has shape \(64, 128\)"),
        (lambda t: t.update({GATE: torch.zeros(128, 64, dtype=torch.int8)}), f"{GATE} has dtype I8"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "unexpected tensor model.extra"),
        (lambda t: t.update({GATE.replace("1", "3"): torch.zeros(1)}), "unexpected tensor model.layers.3"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(301, 64)}), r"lm_head.weight has shape \(301, 64\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(hf_source, tmp_path, edit, message):
    tensors = load_file(hf_source / "model.safetensors")
    edit(tensors)
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_bytes((hf_source / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=message) as caught:
        import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_buffers_and_a_tied_head_are_tolerated(hf_source, tmp_path):
    tensors = load_file(hf_source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(open_weights(tmp_path, model_config_from_hf(hf_source))) == 2 + 9 * 3


@pytest.fixture
def sharded(tmp_path):
    directory = save(transformers_model(), tmp_path / "hf", max_shard_size="100KB")
    return directory, json.loads((directory / INDEX).read_text())


def test_a_missing_shard_is_named(sharded):
    directory, index = sharded
    file = index["weight_map"][GATE]
    (directory / file).unlink()
    refuses(directory, f"{file}: no such file, but .*places tensor model.layers")


def test_an_index_that_names_the_wrong_file_is_refused(sharded):
    directory, index = sharded
    right = index["weight_map"][GATE]
    others = sorted(set(index["weight_map"].values()) - {right})
    for place, message in (
        (others[0], f"{right}: unexpected tensor {GATE}"),
        ("../elsewhere.safetensors", f"the place of tensor {GATE}, is no file name"),
        ("gone.safetensors", f"gone.safetensors: no such file, but {INDEX} places tensor {GATE}"),
    ):
        index["weight_map"][GATE] = place
        (directory / INDEX).write_text(json.dumps(index))
        refuses(directory, message)
    del index["weight_map"]
    (directory / INDEX).write_text(json.dumps(index))
    refuses(directory, "weight_map is missing")


def test_a_shard_without_its_tensor_is_refused(sharded):
    directory, index = sharded
    file = index["weight_map"][GATE]
    tensors = load_file(directory / file)
    del tensors[GATE]
    save_file(tensors, directory / file)
    refuses(directory, f"{file}: tensor {GATE} is missing")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(hf_source, tmp_path, keep):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((hf_source / "config.json").read_bytes())
    (tmp_path / "hf" / "model.safetensors").write_bytes((hf_source / "model.safetensors").read_bytes()[:keep])
    refuses(tmp_path / "hf", "model.safetensors: damaged or cut short")


def test_a_directory_without_safetensors_is_refused(hf_source, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((hf_source / "config.json").read_bytes())
    refuses(tmp_path / "hf", "neither model.safetensors nor")


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A multimodal Gemma 3 with a tower of one small layer, and its directory."""
    text = transformers_model(family="gemma3_text").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text.to_dict(), vision_config=vision | sizes, mm_tokens_per_image=4)
    )
    return model.eval(), save(model, tmp_path_factory.mktemp("multimodal") / "source")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_multimodal_gemma_3_is_reduced_to_its_text_model(multimodal, tmp_path, caplog, prefix):
    theirs, source = multimodal
    directory = tmp_path / "hf"
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    renamed = {
        k.replace("language_model.model.", prefix).replace("model.language_model.", prefix): v
        for k, v in tensors.items()
    }
    assert sum(k.startswith(prefix) for k in renamed) == 2 + 13 * 4 < len(renamed)
    save_file(renamed, directory / "model.safetensors")
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    import_hf(directory, tmp_path / "checkpoint")
    assert "of the vision tower" in caplog.text
    export_hf(tmp_path / "checkpoint", tmp_path / "out", dtype="float32")
    model, report = Gemma3ForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    expected = {k.removeprefix(prefix): v for k, v in renamed.items() if k.startswith(prefix)}
    assert all(torch.equal(v, expected[k]) for k, v in model.model.state_dict().items())
    tokens = np.random.default_rng(0).integers(4, 300, (2, 40))
    assert np.abs(their_logits(model, tokens) - their_logits(theirs, tokens)).max() < 1e-5
    assert np.abs(our_logits(directory, tokens, jnp.float32) - their_logits(theirs, tokens)).max() < 1e-4


def test_a_multimodal_gemma_4_is_reduced_to_its_text_model(tmp_path, caplog):
    """Its towers are left out, and so are keys and values of layers that share those of others."""
    theirs = transformers_model(family="gemma4_small")
    source, directory = save(theirs, tmp_path / "text"), tmp_path / "hf"
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): v for name, v in tensors.items()}
    for name in (
        "vision_tower.a",
        "embed_vision.b",
        "audio_tower.c",
        "embed_audio.d",
        "language_model.layers.7.self_attn.k_proj",
    ):
        renamed[f"model.{name}.weight"] = torch.ones(3)
    save_file(renamed, directory / "model.safetensors")
    text = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": text}))
    tokens = np.random.default_rng(0).integers(4, 300, (2, 40))
    assert np.abs(our_logits(directory, tokens, jnp.float32) - their_logits(theirs, tokens)).max() < 1e-4
    assert "left out 4 tensors of the vision tower" in caplog.text
    model = model_config_from_hf(directory)
    assert (model.model_type, model.num_kv_shared_layers) == ("gemma4_text", 3)


def test_a_tower_in_a_model_that_has_none_is_refused(hf_source, tmp_path):
    tensors = load_file(hf_source / "model.safetensors") | {"vision_tower.x.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="unexpected tensor vision_tower.x.weight"):
        open_weights(tmp_path, model_config_from_hf(hf_source))


def test_a_head_that_a_tied_model_would_drop_is_refused(tmp_path):
    source = save(transformers_model(), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    import_hf(source, tmp_path / "same")
    head[-1, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="lm_head.weight differs from the embedding.*tie_word_embeddings"):
        import_hf(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    source = save(transformers_model(), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[GATE][3, 5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"tensor {GATE} holds NaN or infinity"):
        import_hf(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_stored_tensor_is_that_of_the_opened_file_whatever_part_is_read(tmp_path):
    values = np.arange(40, dtype=np.float32).reshape(8, 5)
    save_arrays({"a": values, "b": values + 100}, tmp_path / "x")
    stored = TensorFile(tmp_path / "x").get_slice("b")
    save_arrays({"a": values - 1, "b": values - 1}, tmp_path / "y")
    (tmp_path / "y").replace(tmp_path / "x")
    for index in (np.s_[2:5], np.s_[2:5, 0:5], np.s_[:], np.s_[1:8:3], np.s_[0:8, 1:3], np.s_[3:3]):
        np.testing.assert_array_equal(stored[index], (values + 100)[index])
    os.truncate(tmp_path / "x", 200)  # that of the new file
    np.testing.assert_array_equal(stored[:], values + 100)
