"""The watchdog: it ends a process whose step or save never comes to an end."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from easylm_mling.errors import STUCK

_RECORD_SECONDS = 10.0


class Watchdog:
    """A context manager: within it, `limit_seconds` (0: no limit) without a `beat` end the process with exit code 85.

    It prints every thread's stack and `what` is wrong. Time counts only while `waiting` is true. `record` is called with
    `what` and the exit code; it may fail or hang, and is waited for a few seconds only.
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
