"""What is wrong inside a step: losses that are not finite (row 8), spikes (row 9), a bit that flips in memory (row 19)."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from processes import assert_same_bits, outcome, train_here

import easylm_mling.run.train
from easylm_mling.checkpoint.parameters import load_params
from easylm_mling.config import load
from easylm_mling.errors import TrainingStopped
from easylm_mling.model.sharding import make_mesh
from easylm_mling.monitoring.metrics import read_lines, read_metrics
from easylm_mling.training.state import abstract_params


def poisoned(value):
    """A batch with `value` as the weight of one target, and so in the loss and in every gradient."""

    def change(batch):
        mask = batch["loss_mask"].copy()
        mask[3, 5] = value
        return batch | {"loss_mask": mask}

    return change


def hard(batch):
    """The same text, and at every place of it a piece as target that it never has there."""
    return batch | {"targets": np.full_like(batch["targets"], 4000)}


def train_with(monkeypatch, changes, run_dir, *overrides, first=1):
    """A run, from step `first` on, some of whose batches are changed on their way to the device."""
    place_batch, steps = easylm_mling.run.train.place_batch, itertools.count(first)
    change = lambda batch: changes.get(next(steps), lambda b: b)(batch)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(easylm_mling.run.train, "place_batch", lambda batch, *where: place_batch(change(batch), *where))
        return train_here(run_dir, *overrides)


def skipped_steps(run_dir):
    return json.loads((run_dir / "ledger.json").read_text())["skipped_steps"]


@pytest.mark.faults
def test_what_is_not_finite_is_skipped_counted_and_told(tmp_path, monkeypatch):
    bad = {4: poisoned(np.nan), 5: poisoned(3e38), 9: poisoned(-3e38)}
    said = train_with(monkeypatch, bad, tmp_path / "through")
    for step in bad:
        assert f"step {step}: skipped: the loss or gradient is not finite" in said
    train_with(monkeypatch, bad, tmp_path / "stopped", "train.stop_at_step=5")
    train_with(monkeypatch, bad, tmp_path / "stopped", first=6)
    for run_dir in (tmp_path / "through", tmp_path / "stopped"):
        lines = read_metrics(run_dir / "metrics.jsonl", "train")
        assert [x["skipped"] for x in lines] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3] and {x["spikes"] for x in lines} == {0}
        assert [x["step"] for x in lines if x["loss"] is None] == list(bad)
        assert skipped_steps(run_dir) == {"spikes": 0, "not_finite": 3}
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome(run_dir)[2]))
    assert_same_bits(outcome(tmp_path / "through"), outcome(tmp_path / "stopped"))


@pytest.mark.faults
def test_losses_that_stay_not_finite_stop_the_run_with_good_checkpoints(tmp_path, monkeypatch):
    settings = ("checkpoint.every_steps=1", "train.max_skipped_in_a_row=3")
    train_here(tmp_path / "before", "train.stop_at_step=5", *settings)
    bad = dict.fromkeys(range(6, 11), poisoned(np.nan))
    with pytest.raises(TrainingStopped, match="was not finite in step 8, the last of 3 in a row that were skipped"):
        train_with(monkeypatch, bad, tmp_path / "run", *settings)
    wanted = outcome(tmp_path / "before")[2]
    model = load([str(tmp_path / "run" / "config.yaml")]).model
    mesh = make_mesh(load([str(tmp_path / "run" / "config.yaml")]).mesh)
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [6, 7]
    for step in kept:
        found = load_params(tmp_path / "run", abstract_params(model, mesh), step)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted)
    assert "step 10/10" in train_here(tmp_path / "run", *settings)


@pytest.mark.faults
def test_a_spike_teaches_nothing_however_the_run_was_stopped(tmp_path, monkeypatch):
    settings = (f"train.budget_tokens={80 * 256}", "train.spike_sigmas=6", "checkpoint.every_steps=20")
    spikes = {70: hard, 73: hard, 74: poisoned(np.nan), 75: hard}
    said = train_with(monkeypatch, spikes, tmp_path / "through", *settings)
    assert "step 70: skipped, a spike: gradient_norm" in said or "step 70: skipped, a spike: loss" in said
    for stop, first in ((65, 1), (71, 66), (74, 72), (0, 75)):
        train_with(monkeypatch, spikes, tmp_path / "run", *settings, f"train.stop_at_step={stop}", first=first)
    for run_dir in (tmp_path / "through", tmp_path / "run"):
        lines = read_metrics(run_dir / "metrics.jsonl", "train")
        assert [x["step"] for x, y in itertools.pairwise(lines) if x["spikes"] < y["spikes"]] == [69, 72, 74]
        assert skipped_steps(run_dir) == {"spikes": 3, "not_finite": 1}
    assert_same_bits(outcome(tmp_path / "through"), outcome(tmp_path / "run"))
    # The guard may be set on the way, and its window is there already.
    train_here(tmp_path / "later", settings[0], "train.stop_at_step=68")
    train_with(monkeypatch, spikes, tmp_path / "later", *settings, first=69)
    assert skipped_steps(tmp_path / "later") == {"spikes": 3, "not_finite": 1}


def erring(monkeypatch, at):
    """After step `at` one bit of one parameter is another."""
    compile_ahead = easylm_mling.run.train.compile_ahead

    def flip(state):
        bits = np.array(state.params["norm"]).view(np.uint32)
        bits[3] ^= np.uint32(1 << 20)
        norm = jax.device_put(bits.view(np.float32), state.params["norm"].sharding)
        return state._replace(params=state.params | {"norm": norm})

    def ahead(*given):
        program = compile_ahead(*given)

        def with_flip(state, batch):
            state, metrics = program.result()(state, batch)
            return (flip(state) if int(state.step) == at else state), metrics

        return SimpleNamespace(result=lambda: with_flip)

    monkeypatch.setattr(easylm_mling.run.train, "compile_ahead", ahead)


@pytest.mark.slow
def test_a_bit_that_flips_in_memory_is_found_by_a_replay(tmp_path, monkeypatch):
    digests = "train.digest_every_steps=1"
    train_here(tmp_path / "undisturbed", digests)
    with monkeypatch.context() as patch:
        erring(patch, 6)
        train_here(tmp_path / "run", digests, "train.stop_at_step=7")
    # Nothing tells, until the steps are done again: here because somebody asks for it.
    with pytest.raises(
        TrainingStopped, match=r"step 6, done again, gave other bits .* first in \['params'\]\['norm'\]"
    ):
        train_here(tmp_path / "run", digests, "train.rewind=4")
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl", "digests")) == 7 + 2
    train_here(tmp_path / "run", digests)
    assert_same_bits(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


@pytest.mark.faults
def test_replays_of_another_program_are_not_compared(tmp_path):
    digests = ("train.digest_every_steps=1", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    train_here(tmp_path / "run", *digests, "train.stop_at_step=6")
    train_here(tmp_path / "run", *digests, "train.stop_at_step=6", "train.rewind=4", "mesh.data=1", "mesh.fsdp=4")
    train_here(tmp_path / "run", *digests, "train.stop_at_step=6", "train.rewind=2", "train.skip_batches=1")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl", "digests")
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6, 5, 6, 3, 4, 5, 6] and len(
        {x["program"] for x in lines}
    ) == 3
