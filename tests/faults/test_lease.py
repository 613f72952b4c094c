"""Who trains a run where there are no locks: one at a time (row 12 of the table), and the dead do not keep it."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from processes import ROOT, TINY

import easylm_mling.storage.lease
from easylm_mling.config import load
from easylm_mling.errors import ConfigError
from easylm_mling.run.directory import RunDirectory
from easylm_mling.storage.lease import LOCK, NAME, Lease, file_store

ENDS = """
import sys, time
from pathlib import Path
import easylm_mling.storage.lease
from easylm_mling.storage.lease import Lease, file_store
easylm_mling.storage.lease.BEAT_SECONDS = 0.1
Lease(file_store(Path(sys.argv[1])), "run", float(sys.argv[2])).take()
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(easylm_mling.storage.lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(easylm_mling.storage.lease, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(easylm_mling.storage.lease, "_LOCK_SECONDS", 2.0)
    return file_store(tmp_path)


def owner(store, **changed):
    """What another owner would have left."""
    found = json.loads(store.read(NAME).result().value) | {"id": "another", "owner": "process 7 on far"} | changed
    store.write(NAME, json.dumps(found).encode()).result()


def elsewhere(folder, lost_seconds=0.0):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENDS, str(folder), str(lost_seconds)]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder
    )
    assert process.stdout and process.stdout.readline() == "taken\n"
    return process


def test_the_living_keep_it_and_the_dead_do_not(store, tmp_path):
    with elsewhere(tmp_path) as process:
        with pytest.raises(ConfigError, match=rf"run_dir=run is being trained by process {process.pid} on "):
            Lease(store, "run", 0).take()
        process.kill()
    store = file_store(tmp_path)  # it may have been killed in a write
    began = time.monotonic()
    lease = Lease(store, "run", 0)
    lease.take()  # at once: that process of this machine is no more
    assert time.monotonic() - began < 1
    time.sleep(0.3)
    lease.release()
    assert store.list().result() == []


def test_a_lock_file_is_taken_away_if_its_process_is_dead_and_only_then(store, tmp_path, monkeypatch):
    (tmp_path / f"other{LOCK}").touch()
    with pytest.raises(TimeoutError):
        store.write("other", b"").result(timeout=0.5)
    lock = tmp_path / f"{NAME}{LOCK}"
    lock.touch()
    monkeypatch.setattr(easylm_mling.storage.lease, "_LOCK_SECONDS", 0.5)
    lease = Lease(file_store(tmp_path), "run", 0)
    lease.take()
    lease.release()
    monkeypatch.setattr(easylm_mling.storage.lease, "_LOCK_SECONDS", 60.0)
    for done_by_the_living in (lock.unlink, lambda: os.utime(lock)):  # a write is over; and another one began
        lock.touch()
        threading.Timer(0.3, done_by_the_living).start()
        began = time.monotonic()
        file_store(tmp_path)
        assert 0.2 < time.monotonic() - began < 60
    assert lock.exists()


def test_an_owner_out_of_reach_is_waited_for_and_then_taken_over(store, tmp_path):
    gone = Lease(store, "run", 0)
    gone.take()
    gone._over.set()
    gone._thread.join()
    owner(store, host="another machine", pid=1)
    os.utime(tmp_path / NAME, (0, 0))  # his clock, and ours, do not count
    began = time.monotonic()
    lease = Lease(store, "run", 0)
    lease.take()
    assert 2 < time.monotonic() - began < 10
    lease.release()


def test_who_lost_it_or_cannot_reach_it_ends(store, tmp_path):
    with elsewhere(tmp_path) as process:
        owner(store)
        assert process.wait(20) == 1
        assert "run was taken over by another process" in process.stderr.read()
    store.write(NAME, None).result()
    folder = tmp_path / "other"
    folder.mkdir()
    with elsewhere(folder, lost_seconds=0.5) as process:
        folder.rename(tmp_path / "away")
        folder.write_text("now a file")
        assert process.wait(20) == 85
        assert "run could not be reached for 0.0 minutes (checkpoint.stuck_minutes)" in process.stderr.read()


def test_a_file_system_without_locks_has_one_trainer_too(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(easylm_mling.storage.lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(easylm_mling.storage.lease, "_LOCK_SECONDS", 0.3)
    config = load(["configs/demo.yaml"], [*TINY, f"run_dir={tmp_path / 'run'}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{NAME}{LOCK}").touch()  # of one that was killed before the run began
    first, second = RunDirectory(config), RunDirectory(config)
    first.take_lease()
    with pytest.raises(ConfigError, match=r"is being trained by process \d+ on "):
        second.take_lease()
    second.close()
    first.close()
    again = RunDirectory(config)
    again.take_lease()
    again.close()
