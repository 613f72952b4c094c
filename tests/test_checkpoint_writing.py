"""A step that is written piece by piece is what Orbax saves of the same parameters, and Orbax restores it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorstore as ts
from hf_models import save, transformers_model
from orbax.checkpoint import v1 as ocp

from easylm_mling.checkpoint import parameters, writing
from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.checkpoint.layout import committed_steps
from easylm_mling.checkpoint.parameters import chunk_shapes, load_params
from easylm_mling.checkpoint.reading import load_info
from easylm_mling.checkpoint.writing import write_checkpoint
from easylm_mling.config import MeshConfig, ModelConfig, to_tree
from easylm_mling.errors import ConfigError
from easylm_mling.hf.config import model_config_from_hf
from easylm_mling.model.params import Parameter, parameter_table, to_flat, to_nested
from easylm_mling.model.sharding import make_mesh, parameter_shardings
from easylm_mling.training.state import abstract_params

SMALL = ModelConfig(70, 16, 48, 3, 4, 2, 8)


def random_bits(table: list[Parameter]) -> dict[str, np.ndarray]:
    """Path -> any finite float32 values: minus zero and denormal numbers among them."""
    rng, arrays = np.random.default_rng(0), {}
    for p in table:
        bits = rng.integers(0, 1 << 32, p.shape, np.uint32)
        values = bits.view(np.float32)
        arrays[p.path] = np.where(np.isfinite(values), values, np.float32(-0.0))
    return arrays


def reader(arrays: dict[str, np.ndarray], size: int = 37):
    """Read `arrays` in pieces of a size that fits nothing."""

    def read(p: Parameter, layer: int):
        flat = (arrays[p.path][layer] if p.stacked else arrays[p.path]).reshape(-1)
        for start in range(0, flat.size, size):
            yield flat[start : start + size].copy()

    return read


def write(target, model: ModelConfig, arrays):
    write_checkpoint(target, parameter_table(model), reader(arrays), lambda folder: {"model": to_tree(model)})


def stored(step: Path) -> dict:
    """Everything in a step: the key-value store of its arrays, and its other files; times and Orbax's shardings aside."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{step}/params/"}}
    store = ts.KvStore.open(spec).result()
    content = {key.decode(): store.read(key).result().value for key in store.list().result()}
    content |= {key: json.loads(value) for key, value in content.items() if key.endswith("zarr.json")}
    for file in step.rglob("*"):
        if file.is_file() and not file.name.startswith(("manifest", "_sharding", "commit")) and file.parent.name != "d":
            content[file.relative_to(step).as_posix()] = json.loads(file.read_text())
    for name in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
        assert content["_CHECKPOINT_METADATA"].pop(name) > 1e18
    return content


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "gemma4_small", "llama"])
def test_the_step_is_what_orbax_saves(tmp_path, family):
    model = model_config_from_hf(save(transformers_model(family=family), tmp_path / "hf"))
    arrays = random_bits(parameter_table(model))
    write(tmp_path / "ours", model, arrays)
    shardings = parameter_shardings(model, make_mesh(MeshConfig(), jax.devices()[:1]))
    with Checkpoints(tmp_path / "theirs") as checkpoints:
        checkpoints.save_params(jax.device_put(to_nested(arrays), shardings), {"model": to_tree(model)})
    ours, theirs = (stored(tmp_path / name / "checkpoints" / "0") for name in ("ours", "theirs"))
    assert len(ours) > 2 * len(arrays) and ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == theirs[name], name
    assert committed_steps(tmp_path / "ours") == [0]


@pytest.mark.parametrize("chunk, read", [(64_000_000, 8_000_000), (700, 100), (4, 4)])
def test_orbax_restores_it_whatever_its_chunks(tmp_path, monkeypatch, chunk, read):
    monkeypatch.setattr(parameters, "_CHUNK", chunk)
    monkeypatch.setattr(parameters, "_READ", read)
    arrays = random_bits(parameter_table(SMALL))
    write(tmp_path / "ours", SMALL, arrays)
    abstract = abstract_params(SMALL, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    step = tmp_path / "ours" / "checkpoints" / "0"
    for params in (
        ocp.load_checkpointables(str(step), {"params": abstract})["params"],
        load_params(tmp_path / "ours", abstract),
    ):
        for path, values in to_flat(params).items():
            assert np.asarray(values).tobytes() == arrays[path].tobytes(), path
    metadata = to_flat(ocp.checkpointables_metadata(str(step)).metadata["params"])
    for p in parameter_table(SMALL):
        assert metadata[p.path].shape == p.shape and metadata[p.path].dtype == np.float32
        assert metadata[p.path].storage_metadata.chunk_shape == chunk_shapes(p)[1]
    with Checkpoints(tmp_path / "ours") as checkpoints:
        assert checkpoints.steps() == [0]


def test_pieces_are_rows_that_are_cut_for_readers_of_columns():
    """Of published sizes: at most 64 MB are written as one, and a host with an eighth of the columns reads an eighth."""
    gemma_7b = ModelConfig(256_000, 3072, 24_576, 28, 16, 16, 256)
    by_path = {p.path: p for p in parameter_table(gemma_7b)}
    assert {path: chunk_shapes(p) for path, p in by_path.items()} == {
        "embed_tokens": ((5120, 3072), (5120, 384)),
        "layers.input_layernorm": ((1, 3072), (1, 3072)),
        "layers.self_attn.q_proj": ((1, 16, 256, 3072), (1, 16, 256, 384)),
        "layers.self_attn.k_proj": ((1, 16, 256, 3072), (1, 16, 256, 384)),
        "layers.self_attn.v_proj": ((1, 16, 256, 3072), (1, 16, 256, 384)),
        "layers.self_attn.o_proj": ((1, 3072, 16, 256), (1, 384, 16, 256)),
        "layers.post_attention_layernorm": ((1, 3072), (1, 3072)),
        "layers.mlp.gate_proj": ((1, 4096, 3072), (1, 4096, 384)),
        "layers.mlp.up_proj": ((1, 4096, 3072), (1, 4096, 384)),
        "layers.mlp.down_proj": ((1, 512, 24_576), (1, 64, 24_576)),
        "norm": ((3072,), (3072,)),
    }
    # 256,019 is a prime: its only divisor would make a chunk of every row.
    (prime,) = [p for p in parameter_table(ModelConfig(256_019, 2048, 8, 1, 1, 1, 8)) if p.path == "embed_tokens"]
    assert chunk_shapes(prime)[0] == (7759, 2048)


@pytest.mark.parametrize("fails", ["read", "describe", "storage", "disk"])
def test_an_error_leaves_nothing(tmp_path, monkeypatch, fails):
    arrays, error = random_bits(parameter_table(SMALL)), KeyboardInterrupt

    def read(p: Parameter, layer: int):
        if fails == "read" and p.path == "norm":
            raise KeyboardInterrupt
        assert not (tmp_path / "checkpoint").exists()
        yield from reader(arrays)(p, layer)

    def describe(folder: Path) -> dict:
        if fails == "describe":
            raise KeyboardInterrupt
        return {}

    if fails in ("storage", "disk"):
        message = {"storage": "DATA_LOSS: \ngone", "disk": "RESOURCE_EXHAUSTED: ...\nNo space left on device"}[fails]
        error = {"storage": OSError, "disk": ConfigError}[fails]

        class Failed:
            def result(self):
                raise ValueError(message)

        monkeypatch.setattr(writing._Arrays, "_begin", lambda self, *_: self._writes.append((Failed(), 1 << 40)))
    with pytest.raises(error) as caught:
        write_checkpoint(tmp_path / "checkpoint", parameter_table(SMALL), read, describe)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    assert ("make room" in str(caught.value)) == (fails == "disk")


def test_a_target_with_content_and_a_small_disk_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "full" / "x").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already exists and is not an empty directory"):
        write_checkpoint(tmp_path / "full", parameter_table(SMALL), None, None)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(ConfigError, match="parameters need 5.1e-05 GB, and the disk has 1e-05 GB left; make room"):
        write_checkpoint(tmp_path / "new", parameter_table(SMALL), None, None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("change", [-1, 1])
def test_too_few_values_and_too_many_are_noticed(tmp_path, change):
    def read(p: Parameter, layer: int):
        yield np.ones(math.prod(p.hf_shape) + change * (p.path == "norm"), np.float32)

    with pytest.raises(AssertionError):
        write_checkpoint(tmp_path / "checkpoint", parameter_table(SMALL), read, lambda folder: {})
    assert list(tmp_path.iterdir()) == []


def test_the_info_is_what_was_described_when_all_was_read(tmp_path):
    arrays, seen = random_bits(parameter_table(SMALL)), []

    def read(p: Parameter, layer: int):
        seen.append(p.path)
        yield from reader(arrays)(p, layer)

    def describe(folder: Path) -> dict:
        (folder / "beside").write_text("x")
        return {"names": [*seen]}

    write_checkpoint(tmp_path / "checkpoint", parameter_table(SMALL), read, describe)
    assert len(load_info(tmp_path / "checkpoint")["names"]) == 9 * 3 + 2
    assert (tmp_path / "checkpoint" / "beside").read_text() == "x"


def test_few_bytes_are_in_flight(tmp_path):
    waited = []

    class Commit(SimpleNamespace):
        def result(self):
            waited.append(self.size)

    view = SimpleNamespace(write=lambda values, **_: SimpleNamespace(commit=Commit(size=values.nbytes)))
    with writing._Arrays(tmp_path) as arrays:
        for i in range(1, 9):
            arrays._begin(view, np.empty(10_000_000, np.float32))
            assert 0 < 40e6 * i - sum(waited) <= 64e6
    assert len(waited) == 8


# VmHWM and not getrusage: the latter starts at what the parent held.
WRITE_AND_REPORT = """
import re, sys
from pathlib import Path
import numpy as np
from easylm_mling.checkpoint.writing import write_checkpoint
from easylm_mling.config import ModelConfig
from easylm_mling.model.params import parameter_table
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
piece = np.full(1000, 0.5, np.float32)
def read(p, layer):
    left = int(np.prod(p.hf_shape))
    while left:
        yield piece[:left]
        left -= min(left, piece.size)
table = parameter_table(ModelConfig(*map(int, sys.argv[2].split(","))))
before = peak()
write_checkpoint(sys.argv[1], table, read, lambda folder: {})
print(peak() - before)
"""


@pytest.mark.slow
def test_writing_holds_a_few_pieces(tmp_path):
    shape = (160_000, 512, 2048, 8, 4, 4, 128)
    total = 4 * sum(math.prod(p.shape) for p in parameter_table(ModelConfig(*shape)))
    command = [sys.executable, "-c", WRITE_AND_REPORT, tmp_path / "checkpoint", ",".join(map(str, shape))]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert total > 4e8 and grown < 3.5e8, (total, grown)
