"""What the workers printed, from the bucket: logs/attempt-NNNN/worker-N.log, each line with its time, and .exit."""

from __future__ import annotations

import heapq
import re

from .bucket import Bucket

_NAME = re.compile(r"logs/attempt-(\d+)/worker-(\d+)\.(log\.1|log|exit)")
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")
_TAIL_BYTES = 262_144


def attempts(bucket: Bucket) -> dict[int, dict[int, list[str]]]:
    """Attempt -> worker -> the names of its objects, oldest part first."""
    found: dict[int, dict[int, list[str]]] = {}
    for name in bucket.list("logs"):
        if match := _NAME.fullmatch(name):
            found.setdefault(int(match[1]), {}).setdefault(int(match[2]), []).append(name)
    for workers in found.values():
        for names in workers.values():
            names.sort(key=lambda n: (n.endswith(".exit"), not n.endswith(".1")))
    return found


def merged(bucket: Bucket, attempt: int | None, worker: int | None, lines: int) -> list[str]:
    """The last `lines` of an attempt (default: the newest) by their times, each with its worker's name."""
    found = attempts(bucket)
    if not found:
        return []
    workers = found.get(max(found) if attempt is None else attempt, {})
    read = []
    for number in sorted(workers):
        if worker in (None, number):
            text = "".join(bucket.read(n, _TAIL_BYTES) or "" for n in workers[number] if ".log" in n)
            read.append([(when, number, line) for when, line in _stamped(text)])
    chosen = list(heapq.merge(*read, key=lambda x: x[:2]))[-lines:]
    return [f"w{number} {when} {line}" for when, number, line in chosen]


def last_errors(bucket: Bucket) -> list[str]:
    """Of the newest attempt in which a worker ended otherwise than done or saved: exit codes, and the line that says why."""
    found = attempts(bucket)
    for attempt in sorted(found, reverse=True)[:5]:
        ended = {}
        for number, names in found[attempt].items():
            code = (bucket.read(names[-1]) or "").strip() if names[-1].endswith(".exit") else ""
            if code not in ("", "0", "42"):
                ended[number] = code
        if ended:
            codes = ", ".join(f"worker {n} ended with {c}" for n, c in sorted(ended.items())[:8])
            return [f"attempt {attempt}: {codes}", *_reasons(bucket, found[attempt], sorted(ended))]
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
