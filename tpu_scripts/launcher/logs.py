"""What the workers printed, from the bucket: logs/attempt-NNNN/worker-N.log, each line with its time, and .exit."""

from __future__ import annotations

import heapq
import re
from collections import Counter

from .bucket import Bucket

_NAME = re.compile(r"logs/attempt-(\d+)/worker-(\d+)\.(log\.1|log|exit)")
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")
_TAIL_BYTES = 262_144
# As many as there can be in the ends that are read.
_FOLLOWED_LINES = 10_000_000


def attempts(bucket: Bucket) -> dict[int, dict[int, list[str]]]:
    """Attempt -> worker -> the names of its objects, oldest part first."""
    objects: dict[int, dict[int, list[str]]] = {}
    for name in bucket.list("logs"):
        if match := _NAME.fullmatch(name):
            objects.setdefault(int(match[1]), {}).setdefault(int(match[2]), []).append(name)
    for workers in objects.values():
        for names in workers.values():
            names.sort(key=lambda n: (n.endswith(".exit"), not n.endswith(".1")))
    return objects


def merged(bucket: Bucket, attempt: int | None, worker: int | None, lines: int) -> list[str]:
    """The last `lines` of an attempt (default: the newest) by their times, each with its worker's name."""
    objects = attempts(bucket)
    if not objects:
        return []
    workers = objects.get(max(objects) if attempt is None else attempt, {})
    read = []
    for number in sorted(workers):
        if worker in (None, number):
            text = "".join(bucket.read(n, _TAIL_BYTES) or "" for n in workers[number] if ".log" in n)
            read.append([(when, number, line) for when, line in _stamped(text)])
    chosen = list(heapq.merge(*read, key=lambda x: x[:2]))[-lines:]
    return [f"w{number} {when} {line}" for when, number, line in chosen]


class Follower:
    """What comes to an attempt's logs, each line once; with no attempt given, of the newest and of all that follow."""

    def __init__(self, bucket: Bucket, attempt: int | None, worker: int | None):
        self.bucket, self.attempt, self.worker = bucket, attempt, worker
        self.shown: dict[int, Counter[str]] = {}

    def more(self) -> list[str]:
        """The lines that came since the last call. Raises NoAnswer, after which nothing is lost."""
        newest = max(attempts(self.bucket), default=0) if self.attempt is None else self.attempt
        # The one before is read once more: its last words may have come since.
        texts = {n: merged(self.bucket, n, self.worker, _FOLLOWED_LINES) for n in sorted({*self.shown, newest} - {0})}
        new = []
        for number, lines in texts.items():
            # The same words may have been said many times in a second.
            left = self.shown.get(number, Counter()).copy()
            for line in lines:
                left[line] -= 1
                if left[line] < 0:
                    new.append(line)
        self.shown = {n: Counter(lines) for n, lines in texts.items() if n == newest}
        return new


def last_errors(bucket: Bucket) -> list[str]:
    """Of the newest attempt in which a worker ended otherwise than done or saved: exit codes, and the line that says why."""
    objects = attempts(bucket)
    for attempt in sorted(objects, reverse=True)[:5]:
        ended = {}
        for number, names in objects[attempt].items():
            code = (bucket.read(names[-1]) or "").strip() if names[-1].endswith(".exit") else ""
            if code not in ("", "0", "42"):
                ended[number] = code
        if ended:
            codes = ", ".join(f"worker {n} ended with {c}" for n, c in sorted(ended.items())[:8])
            return [f"attempt {attempt}: {codes}", *_reasons(bucket, objects[attempt], sorted(ended))]
    return []


def _reasons(bucket: Bucket, workers: dict[int, list[str]], numbers: list[int]) -> list[str]:
    reasons: dict[str, str] = {}
    for number in numbers[:4]:
        text = "".join(bucket.read(n, 20_000) or "" for n in workers[number] if n.endswith(".log"))
        lines = [line for _, line in _stamped(text) if line.strip() and not line.startswith("==")]
        said = [x for x in lines if "error" in x.lower()] or lines
        if said:
            reasons.setdefault(said[-1][:300], f"w{number} {said[-1][:300]}")
    return list(reasons.values())[:2]


def _stamped(text: str):
    """(time, line) of each whole line; one without a time belongs to the line before it."""
    when = ""
    for line in text.splitlines():
        if _STAMP.match(line):
            when, line = line[:20], line[21:]
        if when:
            yield when, line
