"""What the report shows, gathered from a run's directory in one pass over its files and in bounded memory."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from easylm_mling.checkpoint.best import best_steps
from easylm_mling.config import RunConfig, load_kept
from easylm_mling.monitoring.events import ENDS, read_event_log
from easylm_mling.monitoring.goodput import Goodput
from easylm_mling.monitoring.report.curve import Curve
from easylm_mling.storage.jsonl import read_jsonl
from easylm_mling.storage.object_store import run_files

# Curves of the run as a whole, by their name in a train line.
_WHOLE_RUN = (
    "loss", "gradient_norm", "parameter_norm", "learning_rate", "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds",
    "hbm_peak_bytes",
)  # fmt: skip
_SOURCE_POINTS, _LANGUAGE_POINTS, _LISTED = 400, 100, 200
# Speeds are means of so many lines: the time of one step, as the host sees it, depends on what waited before it.
_SECONDS, _LINES, _FEWEST_LINES = ("step_seconds", "data_wait_seconds"), 8, 4
_RATES = ("tokens_per_second", "mfu")


@dataclass
class Attempt:
    """One process's part of the run."""

    number: int
    start: dict  # the event
    first_step: int | None = None
    last_step: int = 0
    end: dict | None = None  # None: killed, or it still runs
    last_event_time: str = ""


@dataclass
class RunHistory:
    """A run as its files tell it. The x of every curve is tokens."""

    config: RunConfig
    config_text: str
    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in _WHOLE_RUN})
    # Losses by source, in training and held out; held out by source and language, and of all.
    training: dict[str, Curve] = field(default_factory=dict)
    held_out: dict[str, Curve] = field(default_factory=dict)
    languages: dict[tuple[str, str], Curve] = field(default_factory=dict)
    validation: Curve = field(default_factory=Curve)
    validation_of_average: Curve = field(default_factory=Curve)  # with `train.ema`
    stop_rates: dict[str, Curve] = field(default_factory=dict)  # by source of conversations
    # Scores on tasks by (measure, row of the suite; "": their mean).
    tasks: dict[tuple[str, str], Curve] = field(default_factory=dict)
    # Held-out bits a byte by source, or "source: language" of a source with several.
    held_out_bits: dict[str, Curve] = field(default_factory=dict)
    # What `eval` found, by suite and row, and the steps that it chose as the best, by suite.
    scores: dict[tuple[str, str], Curve] = field(default_factory=dict)
    best: dict[str, int] = field(default_factory=dict)
    skips: list[int] = field(default_factory=list)
    # The last lines of metrics.jsonl, by kind.
    train: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    consumed_languages: dict = field(default_factory=dict)
    news: deque = field(default_factory=lambda: deque(maxlen=30))
    exports: deque = field(default_factory=lambda: deque(maxlen=10))
    goodput: Goodput = field(default_factory=Goodput)
    attempts: list[Attempt] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)  # the steps that later attempts began after
    checkpoint_events: deque = field(default_factory=lambda: deque(maxlen=_LISTED))
    saved: int = 0
    failed_saves: int = 0
    _recent: deque = field(default_factory=lambda: deque(maxlen=_LINES))

    @property
    def name(self) -> str:
        """The last part of the run's directory."""
        return self.config.run_dir.rstrip("/").rpartition("/")[2] or self.config.run_dir

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return self.train.get("step", 0)

    def add_metrics(self, line: dict):
        """Take in one line of metrics.jsonl. Sources that the config does not know are left out."""
        kind, x = line.get("kind"), self.config.step_tokens.at(line["step"])
        if kind == "train":
            line = self._smooth_speeds(line)
            for name, curve in self.curves.items():
                curve.add(x, line.get(name))
            self._add_losses(self.training, x, line)
            if line.get("skipped", 0) > self.train.get("skipped", 0) and len(self.skips) < _LISTED:
                self.skips.append(line["step"])
            self.skips = [step for step in self.skips if step <= line["step"]]
            self.train = line
        elif kind == "eval":
            self.validation.add(x, line.get("loss"))
            self.validation_of_average.add(x, line.get("ema", {}).get("loss"))
            for source, rate in line.get("sources_stop_rate", {}).items():
                if source in self.config.data.sources:
                    self.stop_rates.setdefault(source, Curve(_LANGUAGE_POINTS)).add(x, rate)
            self._add_losses(self.held_out, x, line)
            for source, losses in line.get("languages", {}).items():
                for language, loss in losses.items() if source in self.config.data.sources else ():
                    self.languages.setdefault((source, language), Curve(_LANGUAGE_POINTS)).add(x, loss)
            several = line.get("languages_bits_per_byte", {})
            for source, bits in line.get("sources_bits_per_byte", {}).items():
                each = {f"{source}: {name}": b for name, b in several.get(source, {}).items()} or {source: bits}
                for name, value in each.items() if source in self.config.data.sources else ():
                    self.held_out_bits.setdefault(name, Curve(_LANGUAGE_POINTS)).add(x, value)
            self.evaluation = line
        elif kind == "tasks":
            for row, scores in {"": line, **line.get("rows", {})}.items():
                for key in ("bits_per_byte", "centred_accuracy"):
                    if scores.get(key) is not None:
                        self.tasks.setdefault((key, row), Curve(_LANGUAGE_POINTS)).add(x, scores[key])
        elif kind == "languages":
            self.consumed_languages = line.get("languages", {})
        elif kind == "news":
            self.news.extend((line["step"], text) for text in line.get("news", ()))
        elif kind == "export":
            self.exports.append(line)

    def add_event(self, event: dict):
        """Take in one line of events.jsonl."""
        self.goodput.add(event)
        name, step = event["event"], event["step"]
        if name == "start" or not self.attempts:
            self.attempts = [*self.attempts[-_LISTED:], Attempt(event["attempt"], event)]
        attempt = self.attempts[-1]
        attempt.last_event_time = event["time"]
        if name == "compiled":
            attempt.first_step = step
            if attempt.number > 1:
                self.restarts = [*self.restarts[-_LISTED:], step - 1]
        elif name in ("first_step", "progress", "evaluated", "saved", "skipped", *ENDS):
            attempt.last_step = max(attempt.last_step, step)
        if name in ENDS:
            attempt.end = event
        if name in ("saved", "save_failed", "restored", "rewound"):
            self.checkpoint_events.append(event)
            self.saved += name == "saved"
            self.failed_saves += name == "save_failed"

    def cut_losses(self):
        """Forget held-out losses of steps that were taken back and are not done again yet."""
        for curve in (
            self.validation,
            *self.held_out.values(),
            *self.languages.values(),
            *self.tasks.values(),
            *self.held_out_bits.values(),
        ):
            curve.cut(self.config.step_tokens.at(self.step) + 1)

    def _add_losses(self, curves: dict[str, Curve], x: int, line: dict):
        for source, loss in line.get("sources", {}).items():
            if source in self.config.data.sources:
                curves.setdefault(source, Curve(_SOURCE_POINTS)).add(x, loss)

    def _smooth_speeds(self, line: dict) -> dict:
        if line["step"] <= self.step or not line.get("step_seconds"):
            self._recent.clear()
            return line
        self._recent.append(line)
        if len(self._recent) < _FEWEST_LINES:
            return {k: v for k, v in line.items() if k not in (*_SECONDS, *_RATES)}
        means = {name: sum(r.get(name) or 0.0 for r in self._recent) / len(self._recent) for name in _SECONDS}
        ratio = line["step_seconds"] / means["step_seconds"]
        return {**line, **means, **{k: line[k] * ratio for k in _RATES if line.get(k)}}


def collect(run_dir: str | Path) -> RunHistory:
    """Read the history of the run in `run_dir`. Raises ConfigError where there is no run."""
    run = run_files(run_dir)
    config, metrics = run / "config.yaml", run / "metrics.jsonl"
    history = RunHistory(load_kept(config), config.read_text(encoding="utf-8"))
    for line in read_jsonl(metrics) if metrics.is_file() else ():
        if isinstance(line.get("step"), int):
            history.add_metrics(line)
    for event in read_event_log(run / "events.jsonl"):
        history.add_event(event)
    history.cut_losses()
    history.best = best_steps(run)
    for step, suite, tree in _results(run):
        # Of a row with several measures the first.
        for score in reversed(tree["scores"]):
            curve = history.scores.setdefault((suite, score["row"]), Curve(_LANGUAGE_POINTS))
            curve.add(history.config.step_tokens.at(step), score["value"])
    return history


def _results(run: Path) -> Iterator[tuple[int, str, dict]]:
    """Yield step, suite and what results-SUITE.json holds of each whole evaluation by `eval`, in the order of steps."""
    for folder in sorted((f for f in run.glob("evaluations/*") if f.name.isdigit()), key=lambda f: int(f.name)):
        for file in sorted(folder.glob("results-*.json")):
            try:
                tree = orjson.loads(file.read_bytes())
            except (OSError, ValueError):
                continue
            if isinstance(tree, dict) and "scores" in tree and not tree["about"]["limit"]:
                yield int(folder.name), file.stem.removeprefix("results-"), tree
