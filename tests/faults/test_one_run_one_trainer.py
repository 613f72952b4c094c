"""What may not happen to a run directory: two trainers (row 12), a full disk (6), a rewind that is half done (13), a time limit."""

import shutil
import subprocess
import time

import pytest
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath
from processes import TINY, assert_same_bits, outcome, train_here

import easylm_mling.run.train
from easylm_mling.checkpoint.reading import load_data_state
from easylm_mling.config import load
from easylm_mling.errors import ConfigError, TrainingStopped
from easylm_mling.monitoring.events import read_event_log
from easylm_mling.run.directory import RunDirectory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(run_dir, "checkpoint.keep_last=9", "checkpoint.every_steps=2")
    return run_dir


def test_a_second_trainer_is_refused_while_the_first_lives(tmp_path):
    first = RunDirectory(load(["configs/demo.yaml"], [*TINY, f"run_dir={tmp_path / 'run'}"]))
    first.take_lease()
    with pytest.raises(ConfigError, match=r"is being trained by process \d+ on "):
        train_here(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lease"]
    first.close()
    train_here(tmp_path / "run", "train.stop_at_step=1")
    train_here(tmp_path / "run", "train.stop_at_step=2")


@pytest.mark.faults
def test_a_disk_that_is_full_for_a_while_costs_nothing(undisturbed, tmp_path, monkeypatch):
    usage, asked = shutil.disk_usage, []

    def full_twice(path):
        asked.append(path)
        return usage(path)._replace(free=1000) if len(asked) <= 2 else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full_twice)
    said = train_here(tmp_path / "run", "checkpoint.every_steps=2")
    assert "step 2: a checkpoint could not be saved" in said and "0 MB are free" in said
    events = list(read_event_log(tmp_path / "run" / "events.jsonl"))
    assert [x["in_a_row"] for x in events if x["event"] == "save_failed"] == [1, 2]
    assert_same_bits(outcome(tmp_path / "run"), outcome(undisturbed))


def test_a_disk_that_stays_full_stops_the_run(tmp_path, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(TrainingStopped, match="3 checkpoints in a row could not be saved"):
        train_here(tmp_path / "run", "checkpoint.every_steps=2")
    with pytest.raises(TrainingStopped, match="1 checkpoints in a row could not be saved"):
        train_here(tmp_path / "other", "train.stop_at_step=1")


@pytest.fixture
def commits_that_fail(monkeypatch):
    """Orbax fails to commit the first so many steps that it has written."""
    left, commit = [0], AtomicRenameTemporaryPath.finalize

    async def finalize(self, *args, **kwargs):
        if left[0] and self.get_final().name.isdigit():
            left[0] -= 1
            raise OSError("no answer")
        return await commit(self, *args, **kwargs)

    monkeypatch.setattr(AtomicRenameTemporaryPath, "finalize", finalize)
    return left


def test_a_save_that_fails_is_told_as_the_step_it_was_of(tmp_path, commits_that_fail):
    commits_that_fail[0] = 1
    train_here(tmp_path / "run", "checkpoint.every_steps=4", "train.stop_at_step=8")
    events = list(read_event_log(tmp_path / "run" / "events.jsonl"))
    assert [e["step"] for e in events if e["event"] == "save_failed"] == [4]
    assert [e["step"] for e in events if e["event"] == "saved"] == [8]


@pytest.mark.faults
def test_the_last_save_is_tried_again(undisturbed, tmp_path, commits_that_fail):
    commits_that_fail[0] = 2
    train_here(tmp_path / "run", "checkpoint.every_steps=10")
    failed = [e for e in read_event_log(tmp_path / "run" / "events.jsonl") if e["event"] == "save_failed"]
    assert [(e["step"], e["in_a_row"]) for e in failed] == [(10, 1), (10, 2)]
    assert_same_bits(outcome(tmp_path / "run"), outcome(undisturbed))


@pytest.mark.faults
def test_a_rewind_is_done_once_and_survives_a_kill(undisturbed, tmp_path, monkeypatch):
    ends = []
    for name in ("at once", "interrupted"):
        run_dir = tmp_path / name
        shutil.copytree(undisturbed, run_dir)
        asked = ["train.rewind=4", "train.skip_batches=2", "checkpoint.every_steps=4", "checkpoint.keep_last=9"]
        if name == "interrupted":
            # Killed before the first step, then the same command; then stopped, and another command goes on.
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(easylm_mling.run.train, "run_steps", killed)
                train_here(run_dir, *asked)
            assert "the run did so before" in train_here(run_dir, *asked, "train.stop_at_step=5")
            train_here(run_dir, "train.stop_at_step=6")
            train_here(run_dir, "checkpoint.keep_last=9")
        else:
            assert "rewound to step 4 from 10, leaving out 2 batches" in train_here(run_dir, *asked)
        aside = sorted(p.name for p in (run_dir / "set-aside").iterdir())
        assert aside == ["checkpoint-10-rewound", "checkpoint-6-rewound", "checkpoint-8-rewound"]
        assert [x["event"] for x in read_event_log(run_dir / "events.jsonl")].count("rewound") == 1
        ends.append(outcome(run_dir))
    assert_same_bits(*ends)
    assert load_data_state(tmp_path / "at once")["lanes"][..., 6].sum() == 12 * 256
    with pytest.raises(
        ConfigError, match="train.rewind=5: there is no checkpoint of that step; there are: 2, 4, 8, 10"
    ):
        train_here(tmp_path / "at once", "train.rewind=5")


def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_ends_when_its_time_is_up(undisturbed, tmp_path):
    assert "of 10, after --max-hours" in train_here(tmp_path / "run", max_hours=0)
    train_here(tmp_path / "run")
    assert_same_bits(outcome(tmp_path / "run"), outcome(undisturbed))


@pytest.mark.faults
def test_a_real_small_disk(undisturbed, tmp_path):
    """A tmpfs that something else fills in the middle of the run, and frees again."""
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        run_dir = tmp_path / "small" / "run"
        train_here(run_dir, "checkpoint.every_steps=2", "train.stop_at_step=4")
        rest = tmp_path / "small" / "rest"
        rest.write_bytes(bytes(shutil.disk_usage(rest.parent).free - 300_000))
        with pytest.raises(TrainingStopped, match="are free"):
            train_here(run_dir, "checkpoint.every_steps=2")
        rest.unlink()
        train_here(run_dir)
        assert_same_bits(outcome(run_dir), outcome(undisturbed))
    finally:
        time.sleep(0.5)
        subprocess.run(["umount", str(tmp_path / "small")], check=True)
