"""A disk that fills up while it is saved to (row 6 of the table): training goes on, and nothing is lost."""

import errno
import shutil
import subprocess
import threading
import time

import pytest
from processes import assert_same_bits, ends, outcome, printed, run, start

from easylm_mling.events import read_event_log
from easylm_mling.records import Records, read_records


class Filler(threading.Thread):
    """Fills the file system of `folder` whenever a save to it begins, for `times` times."""

    def __init__(self, folder, times):
        super().__init__(daemon=True)
        self.folder, self.times = folder, times
        self.start()

    def run(self):
        while self.times:
            if not list(self.folder.glob("run/checkpoints/*tmp*")):
                time.sleep(0.001)
                continue
            try:
                with open(self.folder / "filler", "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(100_000))
            except OSError:
                self.times -= 1
            time.sleep(0.1)
            (self.folder / "filler").unlink()


@pytest.mark.faults
@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_that_fills_in_the_middle_of_saves_costs_nothing(tmp_path, count):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        settings = ("checkpoint.every_steps=1", "checkpoint.max_failed=99", "checkpoint.stuck_minutes=0.7")
        filler = Filler(small, 2)
        processes = start(tmp_path / "run", count, *settings, f"run_dir={small / 'run'}")
        assert ends(tmp_path / "run", processes) == [0] * count, printed(tmp_path / "run")
        assert filler.times == 0
        told = [e["event"] for e in read_event_log(small / "run" / "events.jsonl")]
        assert told.count("save_failed") >= 1
        shutil.copytree(small / "run", tmp_path / "copy")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    run(tmp_path / "undisturbed", count, *settings)
    assert_same_bits(outcome(tmp_path / "copy"), outcome(tmp_path / "undisturbed"))


def test_a_full_disk_neither_stops_nor_blocks_the_record(tmp_path):
    """Row 17: lines wait until there is room, in their order; what was cut in the middle is continued."""
    full = Records(tmp_path / "metrics.jsonl")
    file, room = full._file, [10**6]

    class Small:
        def write(self, content):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = min(room[0], len(content))
            room[0] -= written
            return file.write(content[:written])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            file.close()

    full._file = Small()
    lines = [{"line": n, "text": "x" * n} for n in range(50)]
    for n, line in enumerate(lines):
        room[0] = {10: 5, 20: 30, 30: 10**6, 40: 0}.get(n, room[0])
        full.append(line)
    assert list(read_records(tmp_path / "metrics.jsonl")) == lines[:40]
    with pytest.raises(OSError, match="No space"):
        full.close()
    with pytest.raises(OSError, match="denied"):
        full._file = type("Denied", (Small,), {"write": lambda *_: (_ for _ in ()).throw(PermissionError("denied"))})()
        full.append({})
