"""The run's own records, read from the bucket: metrics.jsonl and events.jsonl, one JSON object a line."""

from __future__ import annotations

import json
import statistics

from .bucket import Bucket, NoAnswer

# The last lines of a record that may be gigabytes long.
_TAIL_BYTES = 262_144
_SPEED_LINES = 20


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


def speed(lines: list[dict]) -> float | None:
    """Tokens a second in the middle of the newest steps: a single one's is far off where the trainer waited for a save."""
    rates = [x["tokens_per_second"] for x in lines if isinstance(x.get("tokens_per_second"), (int, float))]
    return statistics.median(rates[-_SPEED_LINES:]) if rates else None


def newest_train_line(bucket: Bucket) -> dict:
    """What metrics.jsonl says of the newest step, with the `speed` of late; empty where there is none, or no answer."""
    try:
        lines = [
            x for x in tail(bucket, "metrics.jsonl") if x.get("kind") == "train" and isinstance(x.get("step"), int)
        ]
    except NoAnswer:
        return {}
    return {**max(lines, key=lambda x: x["step"]), "tokens_per_second": speed(lines)} if lines else {}


def newest_step(bucket: Bucket) -> int:
    return newest_train_line(bucket).get("step", 0)
