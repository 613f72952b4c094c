"""Compute goodput, where a run's time went, from its events alone."""

from datetime import datetime

KINDS = ("init", "restore", "compile", "step", "evaluation", "save", "lost", "idle", "tasks")
# Events whose own `seconds` are of another kind than the time around them.
_OWN_KINDS = {
    "restored": "restore",
    "compiled": "compile",
    "evaluated": "evaluation",
    "saved": "save",
    "scored": "tasks",
}


class Goodput:
    """The `seconds` of a run by KINDS, which add up to the time from its first start to its last event.

    Time between two events belongs to steps once the attempt has compiled, before that to init. The events' own
    `seconds` are taken out of that. Steps are lost when a later attempt does them again. An attempt that was killed
    ends with its last event, and the time after it is idle.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {kind: 0.0 for kind in KINDS}
        self._last_time: float | None = None
        self._stepping, self._step = False, 0
        # (from step, to step, seconds) of the steps that count: their seconds add up to those of "step".
        self._parts: list[tuple[int, int, float]] = []

    def add(self, event: dict):
        """Take in the next event of the run."""
        now, name, own = datetime.fromisoformat(event["time"]).timestamp(), event["event"], event.get("seconds", 0.0)
        own = max(0.0, own)
        begun = now - own if name == "start" else now
        if self._last_time is None:
            self._last_time = begun
        if name == "start":
            self.seconds["idle"] += max(0.0, begun - self._last_time)
            self._last_time, self._stepping = max(begun, self._last_time), False
        # Clocks of machines differ: time never goes back.
        gap = max(0.0, now - self._last_time)
        self._last_time += gap
        if self._stepping:
            self._add_steps(event["step"], gap)
        else:
            self.seconds["init"] += gap
        if kind := _OWN_KINDS.get(name):
            self.seconds[kind] += self._take(own)
        if name == "compiled":
            self._stepping, self._step = True, event["step"] - 1
            self._lose_after(self._step)

    def total(self) -> float:
        """Seconds from the first start to the last event."""
        return sum(self.seconds.values())

    def share(self) -> float | None:
        """Goodput: the seconds of steps that count over all seconds, or None before any time has passed."""
        total = self.total()
        return self.seconds["step"] / total if total else None

    def _add_steps(self, step: int, seconds: float):
        begin, end, before = self._step, max(step, self._step), 0.0
        if begin == end and self._parts:
            # No further step was done: the last ones took longer.
            begin, end, before = self._parts.pop()
        self._parts.append((begin, end, before + seconds))
        self.seconds["step"] += seconds
        self._step = max(step, self._step)

    def _take(self, wanted: float) -> float:
        """Take up to `wanted` seconds out of those last counted as init or as steps; returns how many there were."""
        if not self._stepping:
            taken = min(wanted, self.seconds["init"])
            self.seconds["init"] -= taken
            return taken
        left = wanted
        for i in reversed(range(len(self._parts))):
            begin, end, seconds = self._parts[i]
            part = min(left, seconds)
            self._parts[i], left = (begin, end, seconds - part), left - part
            if not left:
                break
        self.seconds["step"] -= wanted - left
        return wanted - left

    def _lose_after(self, step: int):
        """Count the steps after `step` as lost: they will be done again."""
        kept = []
        for begin, end, seconds in self._parts:
            again = end - max(begin, step)
            lost = seconds * again / (end - begin) if again > 0 else 0.0
            self.seconds["lost"] += lost
            self.seconds["step"] -= lost
            if begin < step or end <= step:
                kept.append((begin, min(end, step), seconds - lost))
        self._parts = kept
