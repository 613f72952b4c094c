"""Stuck processes end with every thread's stack, and the second signal ends one at once."""

import os
import signal
import subprocess
import sys
import time

from processes import ROOT

WATCHED = """
import time
from easylm_mling.stopping import Watchdog
with Watchdog({limit}, "no step was finished in 0.025 minutes") as watchdog:
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
from easylm_mling.stopping import SIGNALLED, Stop
with Stop(Console()) as stop:
    print("ready", flush=True)
    while stop.wish() != SIGNALLED:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def python(code):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)


def test_a_stuck_step_shows_the_stacks_and_exits_85():
    began = time.monotonic()
    with python(WATCHED.format(limit=1.5, beats=15, stuck=60)) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 85 and time.monotonic() - began > 3
    assert "in stuck_in_a_step" in error and "no step was finished in 0.025 minutes" in error


def test_a_watchdog_of_zero_never_bites():
    with python(WATCHED.format(limit=0, beats=0, stuck=1)) as process:
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
