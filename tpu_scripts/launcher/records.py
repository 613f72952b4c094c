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


def newest_step(bucket: Bucket) -> int:
    """The largest step that the newest lines know; 0 where there are none, or no answer."""
    try:
        return max((e["step"] for e in tail(bucket, "metrics.jsonl") if isinstance(e.get("step"), int)), default=0)
    except NoAnswer:
        return 0
