"""events.jsonl: what happened to a run, and when. Goodput is computed from it alone.

A line is `{"event": NAME, "time": ISO-8601 UTC, "attempt": N, "step": S, ...}`, written by the first process:

start        a process began: `seconds` since it was called, hosts, devices, versions
rewound      `from_step`, `skip_batches` (run/rewind.py)
restored     from the checkpoint of `step`, in `seconds`
compiled     the wait of `seconds` for the program is over; `step` is the first one of the attempt
first_step   it is done, `seconds` after it was launched
progress     `step` is done; written now and then, so that a kill loses little of the time line
evaluated    on held-out text, in `seconds`; scored: on tasks
saved        the checkpoint of `step` is whole: the loop stood still for `seconds` of it; `bytes`
save_failed  `problem`, and how many failed `in_a_row`
skipped      the step changed nothing (`why`: not finite or a spike), and how many did so `in_a_row`
preempted, stopped, done, failed   how the attempt ended: `why`, or of a failure the `error`, and the exit `code` if a
             watchdog ended it. An attempt without such a line was killed
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from easylm_mling.errors import without_secrets
from easylm_mling.monitoring.goodput import Goodput
from easylm_mling.storage.jsonl import JsonlWriter, read_jsonl

ENDS = ("preempted", "stopped", "done", "failed")
# Seconds between progress events: this part of the attempt's age, and at least and at most so many.
_PROGRESS_PART, _PROGRESS_LEAST, _PROGRESS_MOST = 0.01, 1.0, 60.0


class EventLog:
    """Appends to events.jsonl and keeps the run's `goodput` up to date. Leaving it with an error writes `failed`."""

    def __init__(self, path: Path):
        self.attempt, self.step, self.goodput = 1, 0, Goodput()
        for event in read_event_log(path):
            self.goodput.add(event)
            self.attempt, self.step = event["attempt"] + 1, event["step"]
        self._file = JsonlWriter(path)
        self._opened = self._written = time.monotonic()

    def write(self, event: str, step: int, **values):
        """Append one event. Raises OSError if the disk fails; on a full disk events wait for room."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"event": event, "time": now, "attempt": self.attempt, "step": step, **values}
        self._file.append(line)
        self.goodput.add(line)
        self.step, self._written = step, time.monotonic()

    def progress(self, step: int):
        """Write that `step` is done, if the last event is old enough."""
        now = time.monotonic()
        wait = min(_PROGRESS_MOST, max(_PROGRESS_LEAST, _PROGRESS_PART * (now - self._opened)))
        if now - self._written >= wait:
            self.write("progress", step)

    def failed(self, error: str, **values):
        """Write that the attempt failed after the step of the last event."""
        self.write("failed", self.step, error=without_secrets(error)[:500], **values)

    def __enter__(self):
        return self

    def __exit__(self, _, error: BaseException | None, __):
        if error is not None:
            self.failed(" ".join(str(error).split()) or type(error).__name__)
        self._file.close()


def read_event_log(path: Path) -> Iterator[dict]:
    """The events in the order they were written, but for damaged ones; none where there is no file."""
    return (event for event in (read_jsonl(path) if path.exists() else ()) if _is_whole(event))


def _is_whole(event: dict) -> bool:
    kinds = {"event": str, "time": str, "attempt": int, "step": int}
    if not all(isinstance(event.get(key), kind) for key, kind in kinds.items()):
        return False
    try:
        datetime.fromisoformat(event["time"])
    except ValueError:
        return False
    return isinstance(event.get("seconds", 0.0), (int, float))
