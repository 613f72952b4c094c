"""What ends a process before its work is done: signals, its time, and a watchdog over steps that never come."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from rich.console import Console

from easylm_mling.console import say
from easylm_mling.exits import INTERRUPTED, STUCK

# What a process wishes for; the largest of all processes' wishes counts.
GO_ON, OUT_OF_TIME, SIGNALLED = range(3)
_RECORD_SECONDS = 10.0


class Stop:
    """Within it, the first SIGTERM or Ctrl-C asks the loop to save and stop at the next step; the second stops at once."""

    def __init__(self, console: Console, max_hours: float | None = None):
        self._console, self._signalled = console, False
        self._until = None if max_hours is None else time.monotonic() + max_hours * 3600

    def wish(self) -> int:
        if self._signalled:
            return SIGNALLED
        return OUT_OF_TIME if self._until is not None and time.monotonic() >= self._until else GO_ON

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


class Watchdog:
    """Within it, `limit_seconds` (0: of any time) without a `beat` end the process with exit code 85, after every thread's
    stack is shown and `what` is wrong is said. While there is nothing to wait for (`waiting`) time does not count.

    `record`, which is called with `what` and the exit code, may fail or not return: it is waited for a few seconds only.
    """

    def __init__(
        self,
        limit_seconds: float,
        what: str,
        waiting: Callable[[], bool] = lambda: True,
        record: Callable[[str, int], None] = lambda what, code: None,
    ):
        self._limit, self._last, self._over = limit_seconds, time.monotonic(), threading.Event()
        self._what, self._waiting, self._record = what, waiting, record
        self._thread = threading.Thread(target=self._watch, name="easylm-watchdog", daemon=True)

    def beat(self):
        self._last = time.monotonic()

    def __enter__(self):
        self.beat()
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._over.set()

    def _watch(self):
        while not self._over.wait(min(10.0, self._limit / 4)):
            if not self._waiting():
                self.beat()
            elif time.monotonic() - self._last > self._limit:
                self._end()

    def _end(self):
        try:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            print(
                f"error: {self._what}; every thread's stack is above. Start again: the run goes on from its newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            # In a thread of its own, for the disk may be what is stuck.
            recording = threading.Thread(target=self._record, args=(self._what, STUCK), daemon=True)
            recording.start()
            recording.join(_RECORD_SECONDS)
        finally:
            os._exit(STUCK)
