"""A disk that fills up while it is saved to (row 6 of the table): training goes on, and nothing is lost."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import threading
import time

import pytest
from data_corpus import data_config, documents, run_config, tokenizer, tokenizer_path
from processes import SMALL, assert_same_bits, ends, outcome, printed, run, start, train_here

from easylm_mling.cli.main import main
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.loader import Loader
from easylm_mling.monitoring.events import read_event_log
from easylm_mling.storage.jsonl import JsonlWriter, read_jsonl


class Filler(threading.Thread):
    """Fills the file system of `folder` whenever a save to it begins, until `times` times it was full before the save was done."""

    def __init__(self, folder, times):
        super().__init__(daemon=True)
        self.folder, self.times = folder, times
        self.start()

    def run(self):
        while self.times:
            if not list(self.folder.glob("run/checkpoints/*tmp*")):
                time.sleep(0.001)
                continue
            with open(self.folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(self.folder).free - 200_000))
                file.seek(0, os.SEEK_END)
                while True:
                    file.write(bytes(4096))
            self.times -= bool(list(self.folder.glob("run/checkpoints/*tmp*")))
            time.sleep(0.1)
            (self.folder / "filler").unlink()


@contextlib.contextmanager
def small_disk(folder, options):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_disk_that_fills_in_the_middle_of_saves_costs_nothing(tmp_path, count):
    settings = ("checkpoint.every_steps=1", "checkpoint.max_failed=99", "checkpoint.stuck_minutes=0.7")
    with small_disk(tmp_path / "small", "size=32m") as small:
        filler = Filler(small, 2)
        processes = start(tmp_path / "run", count, *settings, f"run_dir={small / 'run'}")
        assert ends(tmp_path / "run", processes) == [0] * count, printed(tmp_path / "run")
        assert filler.times == 0
        told = [e["event"] for e in read_event_log(small / "run" / "events.jsonl")]
        assert told.count("save_failed") >= 1
        shutil.copytree(small / "run", tmp_path / "copy")
    run(tmp_path / "undisturbed", count, *settings)
    assert_same_bits(outcome(tmp_path / "copy"), outcome(tmp_path / "undisturbed"))


def damaged_corpus(path):
    lines = [json.dumps({"text": text}) for text in documents(300)]
    lines[::7] = ["bad 雨"] * len(lines[::7])
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("full_of", ["bytes", "files"])
def test_bad_records_wait_for_room(tmp_path, full_of):
    """Batches go on, no checkpoint that counts the records may begin, and later every one of them is there once."""
    data = data_config(damaged_corpus(tmp_path / "a.jsonl"), tokenizer=tokenizer_path(), data={"max_bad_fraction": 1.0})
    config = run_config(data, 4)
    with small_disk(tmp_path / "small", f"size=1m,nr_inodes={2 if full_of == 'files' else 99}") as small:
        with open(small / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while full_of == "bytes":
                file.write(bytes(10_000))
        wanted, listed = tmp_path / "wanted", small / "quarantine.jsonl"
        with Loader(config.mixer, build_catalog(data), tokenizer(), quarantine=wanted) as loader:
            states = [next(loader)[1] for _ in range(20)]
        with Loader(config.mixer, build_catalog(data), tokenizer(), quarantine=listed) as loader:
            for state in states:
                assert (next(loader)[1].lanes == state.lanes).all()
            with pytest.raises(OSError, match="No space left"):
                loader.flush()
            (small / "filler").unlink()
            loader.flush()
        # How many windows are read ahead is not the same every time.
        found, wanted = listed.read_text().splitlines(), wanted.read_text().splitlines()
        assert len(found) > 5 and all(a == b for a, b in zip(found, wanted, strict=False))
        assert "bad 雨" in found[0]


@pytest.mark.faults
def test_a_checkpoint_waits_for_the_bad_records_that_it_counts(tmp_path, monkeypatch):
    corpus = f"data.sources.skypile.paths={damaged_corpus(tmp_path / 'a.jsonl')}"
    settings = (corpus, "data.max_bad_fraction=1", "checkpoint.every_steps=2")
    train_here(tmp_path / "undisturbed", *settings)
    write, run_dir = JsonlWriter._write, tmp_path / "run"

    def refuses(records):
        if records._path.name == "quarantine.jsonl" and "save_failed" not in (run_dir / "events.jsonl").read_text():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(records)

    monkeypatch.setattr(JsonlWriter, "_write", refuses)
    assert "step 2: a checkpoint could not be saved: [Errno 28] No space left" in train_here(run_dir, *settings)
    failed = [e["step"] for e in read_event_log(run_dir / "events.jsonl") if e["event"] == "save_failed"]
    assert failed == [2]
    found, wanted = ((d / "quarantine.jsonl").read_text().splitlines() for d in (run_dir, tmp_path / "undisturbed"))
    assert found and all(a == b for a, b in zip(found, wanted, strict=False))
    assert_same_bits(outcome(run_dir), outcome(tmp_path / "undisturbed"))


def test_a_full_disk_neither_stops_nor_blocks_the_record(tmp_path):
    """Row 17: lines wait until there is room, in their order; what was cut in the middle is continued."""
    full = JsonlWriter(tmp_path / "metrics.jsonl")
    file, room = full._file, [10**6]

    class Small:
        def write(self, content):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = min(room[0], len(content))
            room[0] -= written
            return file.write(content[:written])

        def close(self):
            file.close()

    full._file = Small()
    lines = [{"line": n, "text": "x" * n} for n in range(50)]
    for n, line in enumerate(lines):
        room[0] = {10: 5, 20: 30, 30: 10**6, 40: 0}.get(n, room[0])
        full.append(line)
    assert list(read_jsonl(tmp_path / "metrics.jsonl")) == lines[:40]
    with pytest.raises(OSError, match="No space"):
        full.close()
    with pytest.raises(OSError, match="denied"):
        full._file = type("Denied", (Small,), {"write": lambda *_: (_ for _ in ()).throw(PermissionError("denied"))})()
        full.append({})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train_here(run_dir, "train.stop_at_step=2")
    return run_dir


def test_a_run_that_may_only_be_read_can_be_used(trained, tmp_path, capsys):
    """Another person's run, or a disk that is mounted for reading: what only reads it ends well."""
    (tmp_path / "theirs").mkdir()
    shutil.copytree(trained, tmp_path / "run")
    binds = ["mount", "--bind", str(tmp_path / "run"), str(tmp_path / "theirs")]
    if subprocess.run(binds, capture_output=True).returncode:
        pytest.skip("only root may mount a folder for reading")
    run_dir = str(tmp_path / "theirs")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", run_dir], check=True)
        assert main(["export-hf", run_dir, str(tmp_path / "hf")]) == 0
        assert "not noted in the run's metrics.jsonl" in capsys.readouterr().err
        assert main(["summary", run_dir]) == 0
        assert main(["data", "audit", run_dir, "--step", "2", "--row", "0"]) == 0
        assert main(["report", run_dir, "--output", str(tmp_path / "report.html")]) == 0
        assert main(["sample", run_dir, "--prompt", "a", "--max-new-tokens", "2"]) == 0
        capsys.readouterr()
        assert main(["train", "configs/demo.yaml", *SMALL, "mesh.cpu_devices=0", f"run_dir={run_dir}"]) == 2
        assert "cannot be written to (" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", "-l", run_dir], check=True)


@pytest.mark.parametrize("size", ["60k", "400k"])
def test_a_model_for_which_there_is_no_room(trained, tmp_path, capsys, size):
    with small_disk(tmp_path / "small", f"size={size}") as small:
        assert main(["export-hf", str(trained), str(small / "hf")]) == 1
        assert "No space left on device" in one_error(capsys)
        assert not list(small.iterdir())
        assert main(["export-hf", str(trained), str(tmp_path / "hf")]) == 0
        capsys.readouterr()
        assert main(["import-hf", str(tmp_path / "hf"), str(small / "imported")]) == 2
        assert "make room" in one_error(capsys)
        assert not list(small.iterdir())


def one_error(capsys) -> str:
    (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    return line
