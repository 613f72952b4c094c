"""One screen about a run, from the bucket and one question to gcloud; with the bucket alone when the machine is gone."""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone

from . import machine as m
from .bucket import Bucket
from .driving import STALE_SECONDS
from .logs import last_errors
from .records import speed, tail
from .requests import all_places
from .run_file import RunFile
from .state import State


def status(gcloud, run: RunFile) -> str:
    """Raises NoAnswer when the bucket cannot be asked."""
    bucket, now = Bucket(gcloud, run.url), time.time()
    state = bucket.state()
    if state is None:
        machine = m.look(gcloud, run)
        there = "" if machine.kind == m.ABSENT else f"; but in {run.zone} of {run.project}: {machine.said}"
        return f"{run.name}: nothing has been started yet ({run.url} holds no state){there}"
    metrics, events = tail(bucket, "metrics.jsonl"), tail(bucket, "events.jsonl")
    rows = [
        ("machine", _machine(gcloud, run, state)),
        ("launcher", _launcher(state, bucket.asked(state.heard) or "run", now)),
        (
            "attempts",
            f"{state.started}, on {state.machines} machines; {state.crashes} crashes in a row without a new step",
        ),
        *_training(metrics, events, bucket, now),
        ("last event", _last_event(state, events, now)),
        ("last error", "\n".join(last_errors(bucket)) or "-"),
    ]
    lines = [f"{run.name}: {run.type} in {run.zone}, {run.url}"]
    for name, text in rows:
        first, *more = text.split("\n")
        lines += [f"  {name:<11} {first}", *(f"  {'':<11} {line}" for line in more)]
    return "\n".join(lines)


def _machine(gcloud, run: RunFile, state: State) -> str:
    """A line for each place where a machine of the run may be."""
    lines = []
    for place in all_places(state, run):
        machine = m.look(gcloud, place)
        text = f"unknown: {machine.said}" if machine.kind == m.UNKNOWN else machine.said
        if machine.kind == m.READY:
            text = f"{machine.said}, {machine.hosts} workers (billed)"
        lines.append(text if (place.zone, place.project) == (run.zone, run.project) else f"{text}, in {place.zone}")
    return "\n".join(lines)


def _launcher(state: State, wanted: str, now: float) -> str:
    if state.ended:
        return f"ended: {state.ended}"
    if not state.launcher:
        return f"nobody drives it; asked for last: {wanted}"
    age = now - state.launcher.get("beat", 0)
    lives = "drives it" if age < STALE_SECONDS else "is gone: `run --keep-alive` takes its place"
    return f"{state.launcher.get('host')} {lives}, last heard of {span(age)} ago; asked for last: {wanted}"


def _training(metrics: list[dict], events: list[dict], bucket: Bucket, now: float) -> list[tuple[str, str]]:
    train = [x for x in metrics if x.get("kind") == "train"]
    if not train:
        return [("step", "none yet")]
    last = max(train, key=lambda x: x["step"])
    budget, tokens, rate = _budget(bucket), last.get("tokens", 0), speed(train)
    share = f" of {count(budget)}, {tokens / budget:.1%}" if budget else ""
    left = f", {span((budget - tokens) / rate)} left" if budget and rate and tokens < budget else ""
    loss = "not finite" if last.get("loss") is None else f"{last['loss']:.4f}"
    # Only what is whole: metrics.jsonl has lines of a save that has only begun.
    saved = [x for x in events if x.get("event") in ("saved", "restored")]
    checkpoint = f"of step {saved[-1]['step']}, {span(now - _seconds(saved[-1]['time']))} old" if saved else "none yet"
    return [
        ("step", f"{last['step']}, {span(now - _seconds(last['time']))} ago; loss {loss}"),
        ("tokens", f"{count(tokens)}{share}"),
        (
            "speed",
            f"{count(rate) if rate else '-'} tokens/s{left}; MFU {_share(metrics, 'mfu')}, goodput {_share(metrics, 'goodput')}",
        ),
        ("checkpoint", checkpoint),
    ]


def _share(metrics: list[dict], name: str) -> str:
    shares = [x[name] for x in metrics if isinstance(x.get(name), float)]
    return f"{shares[-1]:.1%}" if shares else "-"


def _budget(bucket: Bucket) -> int:
    """Tokens, from the resolved config that the run wrote; 0 if it did not yet."""
    # Of a run by epochs the first is 0.
    found = re.findall(r"^ +(?:budget|counted)_tokens: *(\d+) *$", bucket.read("config.yaml") or "", re.MULTILINE)
    return max(map(int, found), default=0)


def _last_event(state: State, events: list[dict], now: float) -> str:
    lines = [f"{text} ({span(now - when)} ago)" for when, text in state.history[-1:]]
    lines += [
        f"trainer: {x['event']} at step {x.get('step')} ({span(now - _seconds(x['time']))} ago)" for x in events[-1:]
    ]
    return "\n".join(lines) or "-"


def _seconds(time_: object) -> float:
    """Of metrics.jsonl Unix seconds, of events.jsonl ISO 8601."""
    if isinstance(time_, (int, float)):
        return float(time_)
    parsed = datetime.fromisoformat(str(time_).replace("Z", "+00:00"))
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)).timestamp()


def count(n: float) -> str:
    """1234567 as '1.23M'."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= scale:
            return f"{n / scale:.3g}{letter}"
    return f"{n:.3g}"


def span(seconds: float) -> str:
    """93784 as '1d 2h'."""
    parts = [(86400, "d"), (3600, "h"), (60, "m"), (1, "s")]
    seconds = max(0, int(seconds))
    for (big, name), (small, below) in zip(parts, parts[1:]):
        if seconds >= big:
            return f"{seconds // big}{name} {seconds % big // small}{below}"
    return f"{seconds}s"
