"""Stuck processes end with every thread's stack, and the second signal ends one at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT, ends, start

from easylm_mling.monitoring.events import read_event_log

WATCHED = """
import time
from easylm_mling.distributed import watchdog as module
module._RECORD_SECONDS = 0.5
def record(what, code):
    print(what, code, flush=True)
    {record}
with module.Watchdog({limit}, "no step was finished in 0.025 minutes", record=record) as watchdog:
    for _ in range({beats}):
        time.sleep(0.2)
        watchdog.beat()
    def stuck_in_a_step():
        time.sleep({stuck})
    stuck_in_a_step()
"""

STOPPED = """
import time
from rich.console import Console
from easylm_mling.run.preemption import SIGNALLED, StopSignal
with StopSignal(Console()) as stop:
    print("ready", flush=True)
    while stop.request() != SIGNALLED:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def python(code):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)


@pytest.mark.parametrize("record", ["time.sleep(60)", pytest.param("1 / 0", marks=pytest.mark.faults)])
def test_a_stuck_step_shows_the_stacks_and_exits_85(record):
    """Whatever becomes of its record."""
    began = time.monotonic()
    with python(WATCHED.format(limit=1.5, beats=15, stuck=60, record=record)) as process:
        said, error = process.communicate(timeout=60)
    assert process.returncode == 85 and 3 < time.monotonic() - began < 30
    assert "in stuck_in_a_step" in error and "no step was finished in 0.025 minutes" in error
    assert said == "no step was finished in 0.025 minutes 85\n"


@pytest.mark.faults
def test_a_stuck_run_leaves_the_event(tmp_path):
    """To compile takes longer than a step may, here."""
    assert ends(tmp_path / "run", start(tmp_path / "run", 1, "train.stuck_minutes=0.02")) == [85]
    last = [*read_event_log(tmp_path / "run" / "events.jsonl")][-1]
    assert (last["event"], last["code"]) == ("failed", 85)
    assert last["error"] == "no step was finished in 0.02 minutes (train.stuck_minutes)"


def test_a_watchdog_of_zero_never_bites():
    with python(WATCHED.format(limit=0, beats=0, stuck=1, record="pass")) as process:
        assert process.wait(60) == 0


def test_the_second_signal_stops_at_once():
    with python(STOPPED) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert "SIGTERM: saving at the next step" in process.stdout.readline()
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert "everything saved so far is whole" in process.stderr.read()
