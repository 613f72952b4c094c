"""Compute goodput, where a run's time went, from its events alone."""

from collections.abc import Iterable
from datetime import datetime

KINDS = ("init", "restore", "compile", "step", "evaluation", "save", "lost", "idle")


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


def goodput(events: Iterable[dict]) -> Goodput:
    """Of all `events` of a run, in order."""
    found = Goodput()
    for event in events:
        found.add(event)
    return found


def _seconds(when: str) -> float:
    return datetime.fromisoformat(when).timestamp()
