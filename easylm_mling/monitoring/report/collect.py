"""What the report shows, gathered from a run's directory in one pass over its files and in bounded memory."""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from easylm_mling.config import RunConfig, load
from easylm_mling.monitoring.events import ENDS, read_event_log
from easylm_mling.monitoring.goodput import Goodput
from easylm_mling.monitoring.report.curve import Curve
from easylm_mling.storage.jsonl import read_jsonl
from easylm_mling.storage.object_store import run_files

# Curves of the run as a whole, by their name in a train line.
WHOLE = (
    "loss", "gradient_norm", "parameter_norm", "learning_rate", "tokens_per_second", "mfu", "tflops_per_chip", "step_seconds",
    "data_wait_seconds", "hbm_peak_bytes",
)  # fmt: skip
_OF_MANY, _LISTED = 400, 200
# Speeds are means of so many lines: what one step takes, as the host sees it, depends on what waited for it before.
_SPEEDS, _LINES, _FEWEST_LINES = ("step_seconds", "data_wait_seconds"), 8, 4
_RATES = ("tokens_per_second", "mfu", "tflops_per_chip")


@dataclass
class Attempt:
    """One process's part of the run."""

    number: int
    start: dict
    first: int | None = None  # the step that it began with
    last: int = 0
    end: dict | None = None  # None: killed, or it still runs
    seen: str = ""


@dataclass
class Findings:
    """A run as its records tell it. x of every curve is tokens."""

    config: RunConfig
    config_text: str
    curves: dict[str, Curve] = field(default_factory=dict)
    # By source, and by (source, language): in training, held out.
    training: dict[str, Curve] = field(default_factory=dict)
    held_out: dict[str, Curve] = field(default_factory=dict)
    languages: dict[tuple[str, str], Curve] = field(default_factory=dict)
    validation: Curve = field(default_factory=Curve)
    skips: list[int] = field(default_factory=list)
    recent: deque = field(default_factory=lambda: deque(maxlen=_LINES))
    train: dict = field(default_factory=dict)  # the last lines
    evaluation: dict = field(default_factory=dict)
    counted: dict = field(default_factory=dict)
    news: deque = field(default_factory=lambda: deque(maxlen=30))
    exports: deque = field(default_factory=lambda: deque(maxlen=10))
    goodput: Goodput = field(default_factory=Goodput)
    attempts: list[Attempt] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)  # the steps that attempts but the first began after
    saves: deque = field(default_factory=lambda: deque(maxlen=_LISTED))
    saved: int = 0
    failed_saves: int = 0

    @property
    def name(self) -> str:
        return self.config.run_dir.rstrip("/").rpartition("/")[2] or self.config.run_dir

    @property
    def step(self) -> int:
        return self.train.get("step", 0)


def collect(run_dir: str | Path) -> Findings:
    """Raises ConfigError where there is no run."""
    run = run_files(run_dir)
    found = Findings(load([str(run / "config.yaml")]), (run / "config.yaml").read_text(encoding="utf-8"))
    found.curves = {name: Curve() for name in WHOLE}
    for line in read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else ():
        if isinstance(line.get("step"), int):
            _take(found, line)
    for event in read_event_log(run / "events.jsonl"):
        found.goodput.add(event)
        _happened(found, event)
    # Of steps that were taken back and not yet done again.
    for curve in (found.validation, *found.held_out.values(), *found.languages.values()):
        curve.cut(found.step * found.config.tokens_per_step + 1)
    return found


def _take(found: Findings, line: dict):
    kind, x = line.get("kind"), line["step"] * found.config.tokens_per_step
    sources = found.config.data.sources
    if kind == "train":
        line = _smoothed(found, line)
        for name, curve in found.curves.items():
            curve.add(x, line.get(name))
        for name, loss in line.get("sources", {}).items():
            if name in sources:
                found.training.setdefault(name, Curve(_OF_MANY)).add(x, loss)
        if line.get("skipped", 0) > found.train.get("skipped", 0) and len(found.skips) < _LISTED:
            found.skips.append(line["step"])
        found.skips = [s for s in found.skips if s <= line["step"]]
        found.train = line
    elif kind == "eval":
        found.validation.add(x, line.get("loss"))
        for name, loss in line.get("sources", {}).items():
            if name in sources:
                found.held_out.setdefault(name, Curve(_OF_MANY)).add(x, loss)
        for name, losses in line.get("languages", {}).items():
            for language, loss in losses.items() if name in sources else ():
                found.languages.setdefault((name, language), Curve(100)).add(x, loss)
        found.evaluation = line
    elif kind == "languages":
        found.counted = line.get("languages", {})
    elif kind == "news":
        found.news.extend((line["step"], text) for text in line.get("news", ()))
    elif kind == "export":
        found.exports.append(line)


def _smoothed(found: Findings, line: dict) -> dict:
    if line["step"] <= found.step or not line.get("step_seconds"):
        found.recent.clear()
        return line
    found.recent.append(line)
    if len(found.recent) < _FEWEST_LINES:
        return {k: v for k, v in line.items() if k not in (*_SPEEDS, *_RATES)}
    means = {name: sum(r.get(name) or 0.0 for r in found.recent) / len(found.recent) for name in _SPEEDS}
    part = line["step_seconds"] / means["step_seconds"]
    return {**line, **means, **{k: line[k] * part for k in _RATES if line.get(k)}}


def _happened(found: Findings, event: dict):
    name, step = event["event"], event["step"]
    if name == "start" or not found.attempts:
        found.attempts = [*found.attempts[-_LISTED:], Attempt(event["attempt"], event)]
    attempt = found.attempts[-1]
    attempt.seen = event["time"]
    if name == "compiled":
        attempt.first = step
        if attempt.number > 1:
            found.restarts = [*found.restarts[-_LISTED:], step - 1]
    elif name in ("first_step", "progress", "evaluated", "saved", "skipped", *ENDS):
        attempt.last = max(attempt.last, step)
    if name in ENDS:
        attempt.end = event
    if name in ("saved", "save_failed", "restored", "rewound"):
        found.saves.append(event)
        found.saved += name == "saved"
        found.failed_saves += name == "save_failed"
