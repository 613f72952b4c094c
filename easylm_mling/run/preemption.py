"""Preemption: requests to stop, by a signal or by a time limit."""

import os
import signal
import sys
import time

from rich.console import Console

from easylm_mling.errors import INTERRUPTED
from easylm_mling.monitoring.console import say

# What a process asks for; the largest of all processes' requests counts.
CONTINUE, OUT_OF_TIME, SIGNALLED = range(3)


class StopSignal:
    """A context manager: within it, the first SIGTERM or Ctrl-C asks the loop to save and stop; the second stops at once."""

    def __init__(self, console: Console, max_hours: float | None = None):
        self._console, self._signalled = console, False
        self._until = None if max_hours is None else time.monotonic() + max_hours * 3600

    def request(self) -> int:
        """CONTINUE, OUT_OF_TIME or SIGNALLED."""
        if self._signalled:
            return SIGNALLED
        return OUT_OF_TIME if self._until is not None and time.monotonic() >= self._until else CONTINUE

    def __enter__(self):
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number, _frame):
        if self._signalled:
            print("interrupted; everything saved so far is whole", file=sys.stderr, flush=True)
            # As hard as a kill, which everything on disk is made to survive: an orderly end would wait for the save.
            os._exit(INTERRUPTED)
        self._signalled = True
        say(self._console, f"{signal.Signals(number).name}: saving at the next step; once more stops at once")
