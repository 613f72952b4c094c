"""The run's own records, read from the bucket: metrics.jsonl and events.jsonl, one JSON object a line."""

from __future__ import annotations

import json

from .bucket import Bucket, NoAnswer

# The last lines of a record that may be gigabytes long.
_TAIL_BYTES = 262_144


def tail(bucket: Bucket, name: str) -> list[dict]:
    """The newest lines; those that are cut are left out. Raises NoAnswer."""
    found = []
    for line in (bucket.read(name, _TAIL_BYTES) or "").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def newest_train_line(bucket: Bucket) -> dict:
    """What metrics.jsonl says of the newest step; empty where there is none, or no answer."""
    try:
        lines = [
            x for x in tail(bucket, "metrics.jsonl") if x.get("kind") == "train" and isinstance(x.get("step"), int)
        ]
    except NoAnswer:
        return {}
    return max(lines, key=lambda x: x["step"], default={})


def newest_step(bucket: Bucket) -> int:
    return newest_train_line(bucket).get("step", 0)
