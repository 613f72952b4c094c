"""A checkpoint that is not what was saved is noticed, set aside and told (row 5); the run goes on from the one before, to the bit."""

import gc
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from processes import assert_same_bits, outcome, train_here

import easylm_mling.checkpoint.reading
from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config import to_tree
from easylm_mling.errors import NO_CHECKPOINT, ConfigError, NoUsableCheckpoint, UnknownFormat, report_error
from easylm_mling.hf.exporting import export_hf, stored_model
from easylm_mling.inference.generate import load_model
from easylm_mling.storage.object_store import run_files
from easylm_mling.training.digests import Pieces, digests, leaf_name

# When a read fails Orbax leaves behind the others that are under way.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")


@pytest.fixture(autouse=True)
def what_is_left_goes_now():
    """And not in the middle of some later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run):
    return outcome(undisturbed_run)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "a bit of a parameter": lambda step: flip(largest(step / "params")),
    "a bit of a moment": lambda step: flip(largest(step / "training")),
    "a bit of what was consumed": lambda step: flip(largest(step / "data" / "ocdbt.process_0")),
    "a bit of the info": lambda step: flip(step / "info" / "_strings.json"),
    "a file cut short": lambda step: os.truncate(largest(step / "params"), 10_000),
    "a file gone": lambda step: (step / "training" / "manifest.ocdbt").unlink(),
}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, id=name, marks=() if i < 1 else pytest.mark.slow) for i, (name, d) in enumerate(DAMAGE.items())],
)
def test_the_step_before_is_taken_aloud(undisturbed, tmp_path, damage):
    run_dir = tmp_path / "run"
    train_here(run_dir, "train.stop_at_step=8")
    damage(run_dir / "checkpoints" / "8")
    said = train_here(run_dir)
    assert (
        "the checkpoint of step 8 is damaged and set aside" in said and "resumed from the checkpoint of step 4" in said
    )
    assert [p.name for p in (run_dir / "set-aside").iterdir()] == ["checkpoint-8-damaged"]
    assert_same_bits(outcome(run_dir), undisturbed)


@pytest.mark.faults
def test_without_a_whole_checkpoint_nothing_begins_anew(tmp_path, capsys):
    run_dir = tmp_path / "run"
    train_here(run_dir, "train.stop_at_step=8")
    for step in ("4", "8"):
        flip(largest(run_dir / "checkpoints" / step / "params"))
    with pytest.raises(
        NoUsableCheckpoint, match=r"every checkpoint is damaged \(step 8: \['params'\]\['embed_tokens'\] is not"
    ) as told:
        train_here(run_dir)
    assert report_error(told.value) == NO_CHECKPOINT == 3
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["4", "8"]


@pytest.mark.faults
def test_parameters_that_are_taken_from_a_damaged_checkpoint_are_named(undisturbed_run, tmp_path):
    """By init_from, by sample (which loads likewise) and by export-hf: of a run, and of an imported checkpoint."""
    shutil.copytree(undisturbed_run, tmp_path / "run")
    model = stored_model(undisturbed_run)
    params, _ = load_model(undisturbed_run)[1:]
    with Checkpoints(tmp_path / "imported") as checkpoints:
        checkpoints.save_params(params, {"model": to_tree(model)})
    shutil.copytree(tmp_path / "imported", tmp_path / "whole")
    for name, step in (("run", "10"), ("imported", "0")):
        damaged = tmp_path / name
        flip(largest(damaged / "checkpoints" / step / "params"))
        with pytest.raises(ConfigError, match=r"\['params'\]\['[a-z_]+'\].* is not what was saved; use another step"):
            train_here(tmp_path / "next", f"init_from={damaged}")
        with pytest.raises(ConfigError, match=r"\['params'\]\['[a-z_]+'\].* is not what was saved; use another step"):
            load_model(damaged)
        with pytest.raises(ConfigError, match=r"parameter [a-z_.]+ is not what was saved; use another step"):
            export_hf(damaged, tmp_path / "hf")
        assert not (tmp_path / "hf").exists() and not list((tmp_path / "next").glob("checkpoints/*"))
        os.truncate(largest(damaged / "checkpoints" / step / "params"), 10_000)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_model(damaged)
    assert "parameters taken from" in train_here(
        tmp_path / "next", f"init_from={tmp_path / 'whole'}", "train.stop_at_step=1"
    )


def test_the_host_finds_the_digest_of_a_device_piece_by_piece():
    x = np.random.default_rng(0).normal(size=(3, 70, 900)).astype(np.float32)
    wanted = digests({"x": jnp.asarray(x)})[leaf_name("x")]
    for axis, cut in ((0, 20), (1, 300), (1, 1)):
        pieces = Pieces()
        for layer in (2, 0, 1):
            for start in range(0, x.shape[1 + axis], cut):
                part = np.take(x[layer], range(start, min(start + cut, x.shape[1 + axis])), axis)
                first = layer * x[0].size + start * (900 if axis == 0 else 1)
                pieces.add(part.reshape(1, -1) if axis == 0 else part, first, 900)
        assert pieces.size == x.size and str(pieces) == wanted
    pieces.add(x[:1, :1, 0], 0, 1)
    assert str(pieces) != wanted


def test_another_format_is_refused_by_name_and_nothing_is_set_aside(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(easylm_mling.checkpoint.reading, "FORMAT", 7)
        train_here(tmp_path / "run", "train.stop_at_step=4")
    with pytest.raises(
        UnknownFormat, match=r"checkpoints/4: this checkpoint has format 7, .* knows format 2; use the version"
    ):
        train_here(tmp_path / "run")
    with pytest.raises(UnknownFormat, match="this checkpoint has format 7"):
        load_info(tmp_path / "run")
    assert not (tmp_path / "run" / "set-aside").exists()
    (tmp_path / "run" / "format.json").write_text('{"format": 2}')
    for refused in (train_here, run_files):
        with pytest.raises(UnknownFormat, match="run: this run directory has format 2, "):
            refused(tmp_path / "run")
    (tmp_path / "run" / "format.json").unlink()
    with pytest.raises(UnknownFormat, match="run: this run directory has no format number, "):
        run_files(tmp_path / "run")


def test_a_digest_is_of_every_bit_and_of_no_mesh():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 16, 4)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    same = {
        digests({"x": jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))})["['x']"]
        for spec in ((), ("a", "b"), (("a", "b"),), (None, "a", "b"))
    }
    assert len(same) == 1
    bits = x.view(np.uint32).reshape(-1)
    for _ in range(20):
        place, bit = rng.integers(bits.size), rng.integers(32)
        bits[place] ^= np.uint32(1 << bit)
        assert digests({"x": jnp.asarray(x)})["['x']"] not in same
        bits[place] ^= np.uint32(1 << bit)
    assert digests({"x": jnp.asarray(x[::-1])})["['x']"] not in same
    assert digests({"x": jnp.asarray(x)})["['x']"] in same
    half = jnp.asarray(x, jnp.bfloat16)
    assert digests([half]) != digests([half.at[0, 0, 0].multiply(-1)]) and digests([x]) != digests([x[::-1]])
