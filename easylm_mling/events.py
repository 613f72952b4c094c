"""What happened to a run, and when: events.jsonl, and goodput, which is computed from nothing else.

A line is `{"event": NAME, "time": ISO-8601 UTC, "attempt": N, "step": S, ...}`, written by the first process:

start        a process begins: `seconds` since it was called, hosts, devices, versions
rewound      `from_step`, `skip_batches` (rewind.py)
restored     from the checkpoint of `step`, in `seconds`
compiled     `step` is the first one of the attempt, whose program was waited for so many `seconds`
first_step   it is done, `seconds` after it was launched
progress     `step` is done; now and then, so that a kill loses little of the time line
evaluated    in `seconds`
saved        the checkpoint of `step` is whole: the loop stood still for `seconds` of it; `bytes`
save_failed  `problem`, and how many `in_a_row`
skipped      the step changed nothing, for it was not finite or a spike; how many `in_a_row`
preempted, stopped, done, failed   how the attempt ended, in one line (`why`; failed: `error`, and of a watchdog's the exit
             `code`). An attempt without such a line was killed
"""

import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from easylm_mling.records import Records, read_records

ENDS = ("preempted", "stopped", "done", "failed")
KINDS = ("init", "restore", "compile", "step", "evaluation", "save", "lost", "idle")
# A progress event after this part of the attempt's age, in seconds at least and at most.
_PROGRESS_PART, _PROGRESS_LEAST, _PROGRESS_MOST = 0.01, 1.0, 60.0


class EventLog:
    """Appends to RUN/events.jsonl, and keeps the run's goodput up to date. Leaving it with an error writes `failed`."""

    def __init__(self, path: Path):
        self.attempt, self.step, self.goodput = 1, 0, Goodput()
        for event in read_event_log(path):
            self.goodput.add(event)
            self.attempt, self.step = event["attempt"] + 1, event["step"]
        self._records = Records(path)
        self._begun = self._told = time.monotonic()

    def write(self, event: str, step: int, **values):
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"event": event, "time": now, "attempt": self.attempt, "step": step, **values}
        self._records.append(record)
        self.goodput.add(record)
        self.step, self._told = step, time.monotonic()

    def progress(self, step: int):
        """Write that `step` is done, if the last event is old enough."""
        now = time.monotonic()
        wait = min(_PROGRESS_MOST, max(_PROGRESS_LEAST, _PROGRESS_PART * (now - self._begun)))
        if now - self._told >= wait:
            self.write("progress", step)

    def __enter__(self):
        return self

    def __exit__(self, _, error: BaseException | None, __):
        if error is not None:
            self.failed(" ".join(str(error).split()) or type(error).__name__)
        self._records.close()

    def failed(self, error: str, **values):
        self.write("failed", self.step, error=without_secrets(error)[:500], **values)


class Goodput:
    """Where a run's time went, from its first start to its last event: `seconds` by KINDS, which add up to all of it.

    Time between two events belongs to steps once the attempt has compiled, before that to init. An event's own
    `seconds` are taken out of that. Steps are lost when a later attempt does them again. An attempt that was killed
    ends with its last event, and what it did after that is idle.
    """

    _OWN = {"restored": "restore", "compiled": "compile", "evaluated": "evaluation", "saved": "save"}

    def __init__(self):
        self.seconds: dict[str, float] = {kind: 0.0 for kind in KINDS}
        self._last: float | None = None
        self._stepping, self._step = False, 0
        # (from step, to step, seconds): what each part of the steps that still count took.
        self._parts: list[tuple[int, int, float]] = []

    def add(self, event: dict):
        now, name, own = _seconds(event["time"]), event["event"], max(0.0, event.get("seconds", 0.0))
        if name == "start":
            begun = now - own
            self._put("idle", begun - (begun if self._last is None else self._last))
            self._last, self._stepping = begun if self._last is None else max(begun, self._last), False
        gap = max(0.0, now - (now if self._last is None else self._last))
        self._last = now if self._last is None else max(now, self._last)
        if not self._stepping:
            self.seconds["init"] += gap
        elif event["step"] > self._step:
            self._parts.append((self._step, event["step"], gap))
            self._step, self.seconds["step"] = event["step"], self.seconds["step"] + gap
        else:
            self._lengthen(gap)
        if kind := self._OWN.get(name):
            self.seconds[kind] += self._take(own)
        if name == "compiled":
            self._lose_from(event["step"] - 1)
            self._stepping, self._step = True, event["step"] - 1

    def share(self) -> float | None:
        """Seconds of steps that count, over all."""
        total = sum(self.seconds.values())
        return self.seconds["step"] / total if total else None

    def _put(self, kind: str, seconds: float):
        self.seconds[kind] += max(0.0, seconds)

    def _lengthen(self, seconds: float):
        begin, end, before = self._parts.pop() if self._parts else (self._step, self._step, 0.0)
        self._parts.append((begin, end, before + seconds))
        self.seconds["step"] += seconds

    def _take(self, seconds: float) -> float:
        """Up to so many seconds out of what was last counted as init or as steps; returns how many there were."""
        if not self._stepping:
            taken = min(seconds, self.seconds["init"])
            self.seconds["init"] -= taken
            return taken
        left = seconds
        for i in reversed(range(len(self._parts))):
            begin, end, held = self._parts[i]
            part = min(left, held)
            self._parts[i], left = (begin, end, held - part), left - part
            if not left:
                break
        self.seconds["step"] -= seconds - left
        return seconds - left

    def _lose_from(self, step: int):
        """Steps after `step` will be done again."""
        kept = []
        for begin, end, held in self._parts:
            share = (end - max(begin, step)) / (end - begin) if end > max(begin, step) else 0.0
            self.seconds["lost"] += held * share
            self.seconds["step"] -= held * share
            if begin < step or end <= step:
                kept.append((begin, min(end, step), held * (1 - share)))
        self._parts = kept


def read_event_log(path: Path) -> Iterator[dict]:
    """The events in the order they were written; none where there is no file."""
    for event in read_records(path) if path.exists() else ():
        named = isinstance(event.get("event"), str) and isinstance(event.get("time"), str)
        if named and isinstance(event.get("attempt"), int) and isinstance(event.get("step"), int):
            yield event


def goodput(events: Iterable[dict]) -> Goodput:
    """Of all `events` of a run, in order."""
    found = Goodput()
    for event in events:
        found.add(event)
    return found


def _seconds(when: str) -> float:
    return datetime.fromisoformat(when).timestamp()


def without_secrets(text: str) -> str:
    """Addresses without what may be a key in them: names before an @, and everything behind a question mark."""
    text = re.sub(r"(\w+://)[^/\s'\"@]+@", r"\1...@", text)
    return re.sub(r"(\w+://[^\s'\"?]*)\?[^\s'\"]*", r"\1?...", text)
