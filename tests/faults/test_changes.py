"""What has changed when a run is resumed: its settings and mesh (row 14), the files that it reads (row 18).

Changed and new sources, and another tokenizer: tests/test_data_audit.py; single bad records: tests/test_data_bad_records.py.
"""

import os
import shutil

import jax
import numpy as np
import pytest
from processes import ROOT, assert_same_bits, outcome, run, train_here

import easylm_mling.run.train
from easylm_mling.errors import ConfigError
from easylm_mling.monitoring.metrics import read_metrics


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(run_dir, "checkpoint.every_steps=5")
    return run_dir


@pytest.fixture
def halfway(undisturbed, tmp_path):
    """The undisturbed run as it was at step 5."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    return tmp_path / "run"


REFUSED = {
    "train.seed": 1,
    "train.budget_tokens": 5000,
    "train.batch_size": 16,
    "train.compute_dtype": "bfloat16",
    "train.z_loss": 0.1,
    "optimizer.learning_rate": 0.1,
    "optimizer.schedule": "wsd",
    "optimizer.warmup": "3 steps",
    "optimizer.clip_norm": 2.0,
    "model.hidden_size": 64,
    "model.num_hidden_layers": 3,
    "model.rms_norm_eps": 1e-5,
    "data.seed": 1,
    "data.lanes": 4,
    "data.sequence_length": 64,
    "data.block_bytes": 20_000,
    "data.sources.skypile.weight": 21,
    "data.sources.skypile.holdout_fraction": 0.1,
}


def test_what_changes_the_meaning_of_a_run_is_refused_by_name(halfway, capsys):
    before = sorted(p.name for p in halfway.rglob("*"))
    for key, value in REFUSED.items():
        with pytest.raises(ConfigError, match=f"belongs to a run with another config: .*{key} was .*, now {value}"):
            train_here(halfway, f"{key}={value}")
    assert sorted(p.name for p in halfway.rglob("*")) == before


def test_what_changes_no_bit_goes_on(undisturbed, halfway):
    free = ("checkpoint.every_steps=3", "checkpoint.keep_last=3", "train.log_every_steps=1", "train.stuck_minutes=9")
    train_here(halfway, *free, "data.retries=2", "train.max_skipped_in_a_row=9")
    assert_same_bits(outcome(halfway), outcome(undisturbed))


@pytest.mark.faults
@pytest.mark.long
def test_a_spike_guard_that_skips_nothing_changes_no_bit(tmp_path):
    """It is a part of the compiled step, so both are compiled as in training, and not as programs of tests are."""
    as_in_training = {"XLA_FLAGS": ""}
    run(tmp_path / "undisturbed", 1, environment=as_in_training)
    run(tmp_path / "run", 1, "train.stop_at_step=5", environment=as_in_training)
    run(tmp_path / "run", 1, "train.spike_sigmas=6", environment=as_in_training)
    assert_same_bits(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


@pytest.mark.faults
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 4, 2)])
def test_another_mesh_restores_the_same_bits_and_reads_the_same_batches(undisturbed, halfway, mesh):
    """The sums of another mesh have another order: the loss agrees to rounding. A restore compares every leaf's digest."""
    axes = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    assert "resumed from the checkpoint of step 5" in train_here(halfway, *axes, "train.accumulation_steps=1")
    (_, data, _), (_, expected, _) = outcome(halfway), outcome(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, data, expected)
    losses = [[x["loss"] for x in read_metrics(r / "metrics.jsonl", "train")] for r in (halfway, undisturbed)]
    assert losses[0][:5] == losses[1][:5]
    # Of step 6, which both begin with the same parameters; later ones drift apart, as on any two meshes.
    np.testing.assert_allclose(losses[0][5], losses[1][5], rtol=1e-6)
    np.testing.assert_allclose(losses[0][6:], losses[1][6:], rtol=1e-4)


@pytest.fixture
def shards(tmp_path):
    for path in (ROOT / "data/sample/skypile/data").glob("*.jsonl"):
        for i in range(3):
            (tmp_path / "shards").mkdir(exist_ok=True)
            lines = path.read_bytes().splitlines(keepends=True)[i::3]
            (tmp_path / "shards" / f"{i}-{path.name}").write_bytes(b"".join(lines))
    return sorted((tmp_path / "shards").iterdir())


def shorter(path):
    os.truncate(path, path.stat().st_size // 2)


def gone(path):
    path.unlink()


@pytest.mark.faults
@pytest.mark.parametrize("damage", [shorter, gone])
def test_a_shard_that_is_missing_or_short_stops_the_run(shards, tmp_path, damage, monkeypatch):
    """On a resume, before anything is read; and while the run goes on, when it is read next."""
    paths = f"data.sources.skypile.paths={tmp_path / 'shards'}/*.jsonl"
    train_here(tmp_path / "whole", paths)
    train_here(tmp_path / "run", paths, "train.stop_at_step=4")
    kept = shards[1].read_bytes()
    damage(shards[1])
    with pytest.raises(ConfigError, match=f"{shards[1]} is (changed|missing)"):
        train_here(tmp_path / "run", paths)
    shards[1].write_bytes(kept)
    train_here(tmp_path / "run", paths)
    assert_same_bits(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))

    loader = easylm_mling.run.train.Loader

    def damaged_meanwhile(*given):
        for shard in shards:
            damage(shard)
        return loader(*given)

    monkeypatch.setattr(easylm_mling.run.train, "Loader", damaged_meanwhile)
    with pytest.raises((ValueError, OSError), match=str(tmp_path / "shards")):
        train_here(tmp_path / "meanwhile", paths, "data.retries=0")
