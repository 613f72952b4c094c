"""Export: the same bits out as in, files that transformers loads, and nothing half done."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import (
    INDEX,
    TINY,
    any_finite_bits,
    raw_tensors,
    save,
    transformers_model,
)
from safetensors.torch import load_file
from transformers import GemmaForCausalLM

from easylm_mling.checkpoint import parameters
from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.config import MeshConfig, ModelConfig, to_tree
from easylm_mling.errors import ConfigError
from easylm_mling.hf import exporting
from easylm_mling.hf.config import model_config_from_hf
from easylm_mling.hf.exporting import export_hf, stored_model
from easylm_mling.hf.importing import import_hf, open_weights, read_params, widest_mesh
from easylm_mling.model.sharding import make_mesh, parameter_shardings
from easylm_mling.training.spike_guard import nothing_recent
from easylm_mling.training.state import TrainState, init_params


@pytest.mark.parametrize(
    "family, dtype, shard",
    [
        ("gemma", "bfloat16", "10MB"),
        ("gemma", "float32", "60KB"),
        ("gemma2", "bfloat16", "60KB"),
        ("gemma3_text", "bfloat16", "60KB"),
        ("gemma3_text", "float32", "10MB"),
        ("gemma4", "bfloat16", "60KB"),
        ("gemma4_small", "bfloat16", "60KB"),
        ("gemma4_unified", "float32", "10MB"),
        ("llama", "float32", "60KB"),
        ("llama3", "bfloat16", "10MB"),
        ("mistral", "bfloat16", "60KB"),
        ("qwen2", "float32", "60KB"),
        ("qwen2_yarn", "bfloat16", "10MB"),
        ("qwen3", "bfloat16", "60KB"),
    ],
)
def test_a_round_trip_keeps_every_bit(tmp_path, family, dtype, shard):
    model = any_finite_bits(transformers_model(4, 2, getattr(torch, dtype), family))
    source = save(model, tmp_path / "source", max_shard_size=shard)
    import_hf(source, tmp_path / "checkpoint")
    bytes_a_file = {"10MB": 10e6, "60KB": 60e3}[shard]
    exported = tmp_path / "exported"
    warnings = export_hf(tmp_path / "checkpoint", exported, dtype=dtype, max_shard_bytes=bytes_a_file)
    # A tiny Llama's or Mistral's BOS is not that of the tokenizer beside it, as is said.
    assert ["puts 0 BOS" in warning for warning in warnings] == [True] * family.startswith(("llama", "mistral"))
    assert raw_tensors(exported) == raw_tensors(source)
    assert (exported / INDEX).is_file() == (source / INDEX).is_file() == (shard == "60KB")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("devices", [0, 1, 8])
def test_small_chunks_come_out_in_order(tmp_path, monkeypatch, devices):
    """Rows in pieces where a parameter is stored by rows, whole tensors where devices held columns; 0 devices: an import."""
    monkeypatch.setattr(parameters, "_CHUNK", 4096)
    monkeypatch.setattr(parameters, "_READ", 1000)
    monkeypatch.setattr(exporting, "_PIECE", 10_000)
    real, axes = exporting._pieces, []
    monkeypatch.setattr(exporting, "_pieces", lambda view: axes.append(real(view)[0]) or real(view))
    source = save(any_finite_bits(transformers_model(dtype=torch.bfloat16)), tmp_path / "source")
    if devices:
        model = model_config_from_hf(source)
        params = read_params(open_weights(source, model), model, make_mesh(MeshConfig(), jax.devices()[:devices]))
        with Checkpoints(tmp_path / "checkpoint") as checkpoints:
            checkpoints.save_params(params, {"model": to_tree(model)})
    else:
        import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported")
    assert raw_tensors(tmp_path / "exported") == raw_tensors(source)
    assert axes[0] == {0: 0, 1: 0, 8: 1}[devices] and 0 in axes and (max(axes) > 0) == (devices > 0)
    stored = exporting.open_stores(tmp_path / "checkpoint" / "checkpoints" / "0", stored_model(tmp_path / "checkpoint"))
    for path, store in stored.items():
        chunk = store.chunk_layout.read_chunk_template.shape
        assert 4 * np.prod(chunk) <= 4096 and (chunk[0] == 1 or not path.startswith("layers.")), path


def test_float16_is_widened_exactly(tmp_path):
    model = any_finite_bits(transformers_model(4, 2, torch.float16))
    import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", dtype="float32")
    expected = {k: v.float().numpy().tobytes() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert {k: v[2] for k, v in raw_tensors(tmp_path / "exported").items()} == expected


def test_export_rounds_to_nearest_even(tmp_path):
    model = any_finite_bits(transformers_model())
    ties = model.model.norm.weight.data.view(torch.int32)
    ties[:4] = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF], dtype=torch.int32)
    import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported")
    bits = np.frombuffer(raw_tensors(tmp_path / "exported")["model.norm.weight"][2], np.uint16)
    assert bits[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F81]
    loaded = load_file(tmp_path / "exported" / "model.safetensors")
    for name, values in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(loaded[name].view(torch.int16), values.bfloat16().view(torch.int16)), name


@pytest.mark.parametrize("max_shard_bytes", [1e9, 50_000])
def test_transformers_loads_the_export_whole(imported, hf_source, tmp_path, max_shard_bytes):
    export_hf(imported, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    model, report = GemmaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert "lm_head.weight" not in raw_tensors(tmp_path / "out")
    expected = GemmaForCausalLM.from_pretrained(hf_source).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_shards_obey_the_limit_and_the_index_counts(imported, tmp_path):
    limit = 50_000
    export_hf(imported, tmp_path / "out", max_shard_bytes=limit)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert (
        files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 3
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = raw_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(np.prod(shape) for _, shape, _ in tensors.values())
    for file in files:
        blob = (tmp_path / "out" / file).read_bytes()
        length = int.from_bytes(blob[:8], "little")
        assert length % 8 == 0 and json.loads(blob[8 : 8 + length])["__metadata__"] == {"format": "pt"}
        assert len(blob) - 8 - length <= limit


def test_a_checkpoint_of_a_run_exports_its_own_step(tmp_path):
    model = ModelConfig(**TINY, num_attention_heads=4, num_key_value_heads=2)
    params, info = jax.jit(lambda: init_params(model, 0))(), {"config": {"model": to_tree(model)}}
    with Checkpoints(tmp_path / "run", keep_last=5) as checkpoints:
        for step in (3, 20):
            shifted = jax.tree.map(lambda x, by=step: x + by, params)
            count = jnp.int32(step)
            state = TrainState(count, shifted, (count,), *[count] * 3, nothing_recent())
            assert checkpoints.save(state, np.zeros(1, np.int64), info, wait=True).ok
    for step, expected in ((None, 20), (3, 3)):
        out = tmp_path / f"out{expected}"
        (warning,) = export_hf(tmp_path / "run", out, step=step, dtype="float32")
        assert "no tokenizer" in warning and "\n" not in warning
        values = load_file(out / "model.safetensors")["model.norm.weight"]
        assert torch.equal(values, torch.full((64,), float(expected)))
    with pytest.raises(ConfigError, match="no checkpoint of step 4; there are 3, 20"):
        export_hf(tmp_path / "run", tmp_path / "out4", step=4)


@pytest.mark.parametrize("calls", [0, 1, 9])
def test_a_killed_export_leaves_nothing(imported, tmp_path, monkeypatch, calls):
    real, made = exporting._pieces, []

    def dies(view):
        assert not (tmp_path / "out").exists()
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(view)
        return real(view)

    monkeypatch.setattr(exporting, "_pieces", dies)
    with pytest.raises(KeyboardInterrupt):
        export_hf(imported, tmp_path / "out", max_shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "copy")
    for path in (tmp_path / "copy" / "checkpoints" / "0" / "params").glob("d/*"):
        path.unlink()
    with pytest.raises(ConfigError, match="parameter embed_tokens cannot be read"):
        export_hf(tmp_path / "copy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directories_with_content_are_refused(hf_source, imported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="full: already exists"):
        import_hf(hf_source, tmp_path / "full")
    with pytest.raises(ConfigError, match="full: already exists"):
        export_hf(imported, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_hf(imported, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_export_refuses_what_it_cannot_write(imported, tmp_path):
    with pytest.raises(ConfigError, match="dtype='int8' cannot be exported"):
        export_hf(imported, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="max_shard_bytes=0"):
        export_hf(imported, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(ConfigError, match="no checkpoint here"):
        export_hf(tmp_path, tmp_path / "out")


# VmHWM and not getrusage: the latter starts at what the parent held.
EXPORT_AND_REPORT = """
import re, sys
from pathlib import Path
from easylm_mling.hf import exporting, importing
exporting._PIECE = 1_000_000
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
exporting.stored_model(sys.argv[1])
before = peak()
exporting.export_hf(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


def test_export_holds_about_one_tensor(tmp_path):
    model = ModelConfig(8000, 512, 2048, 16, 4, 4, 128)
    halves = lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.5), jax.eval_shape(lambda: init_params(model, 0)))  # noqa: E731
    params = jax.jit(halves, out_shardings=parameter_shardings(model, widest_mesh(model)))()
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    with Checkpoints(tmp_path / "checkpoint") as checkpoints:
        checkpoints.save_params(params, {"model": to_tree(model)})
    command = [sys.executable, "-c", EXPORT_AND_REPORT, tmp_path / "checkpoint", tmp_path / "out"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    largest_tensor = 4 * 8000 * 512
    assert total > 2.8e8 and grown < 2 * largest_tensor, (total, grown)
