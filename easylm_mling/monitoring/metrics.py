"""metrics.jsonl: the numbers of a run, one JSON object a line: `{"kind": ..., "step": ..., "time": ..., ...}`.

train      a logged step: `tokens` so far; `loss` (nats a token; `sources`: of each), `gradient_norm`, `parameter_norm`,
           `learning_rate`, `skipped` and of them `spikes` so far; `ledger`: what was consumed of each source; TIMINGS
eval       `loss` and `bits_per_byte` of held-out text, and of conversations `stop_rate`; of each source and language, see
           run/validation.py. `ema`: the same of the averaged parameters, with `train.ema`
tasks      `bits_per_byte` of right answers and `centred_accuracy` on `eval.suite`; of each of its `rows`, see
           evaluation/scoring/items.py; `seconds`, and the share of the run's time that all such scores took
languages  at each checkpoint, `languages`: what was consumed of each
news       what became of sources, and which steps were skipped
export     a step, its `dtype` and the `path` that it was exported to; `averaged`: the steps that it is the mean of
digests    of every array of the state, with `train.digest_every_steps` (run/replay_check.py)
"""

import math
import time
from pathlib import Path

import numpy as np

from easylm_mling.monitoring.trackers import Trackers
from easylm_mling.storage.jsonl import JsonlWriter, read_jsonl

# The keys of a train line whose values differ when a run is repeated.
TIMINGS = (
    "time", "step_seconds", "data_wait_seconds", "tokens_per_second", "tokens_per_second_per_chip", "tflops_per_chip", "mfu",
    "hbm_bytes", "hbm_peak_bytes", "checkpoint_seconds", "checkpoint_age_seconds", "goodput", "seconds_to_budget",
    "seconds", "share_of_run",
)  # fmt: skip


class MetricsLog:
    """Appends lines to `path`, and hands them to the `trackers`. A context manager."""

    def __init__(self, path: Path, trackers: Trackers | None = None):
        self._file, self._trackers = JsonlWriter(path), trackers

    def write(self, kind: str, step: int, **values):
        """Append one line. Raises OSError if the disk fails; on a full disk lines wait for room."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.append(line)
        if self._trackers:
            self._trackers.put(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def read_metrics(path: Path, kind: str) -> list[dict]:
    """The lines of one kind in order of steps. Where a resumed run wrote a step again, the later line counts."""
    by_step = {line["step"]: line for line in read_lines(path, kind)}
    return [by_step[step] for step in sorted(by_step)]


def read_lines(path: Path, kind: str) -> list[dict]:
    """All lines of one kind in the order they were written, but for damaged ones."""
    return [line for line in read_jsonl(path) if line.get("kind") == kind and isinstance(line.get("step"), int)]


def step_metrics(metrics: dict, names: list[str]) -> dict:
    """The device's metrics of one step as plain numbers, with the loss over all targets and over each source's.

    `loss_sum` and `loss_count` are [sources], in the order of `names`.
    """
    sums, counts = np.asarray(metrics["loss_sum"], np.float64), np.asarray(metrics["loss_count"], np.float64)
    norms = {name: finite(float(metrics[name])) for name in ("gradient_norm", "parameter_norm") if name in metrics}
    return {
        "loss": mean_loss(sums.sum(), counts.sum()),
        "sources": {n: mean_loss(s, c) for n, s, c in zip(names, sums, counts, strict=True) if c},
        "learning_rate": float(metrics["learning_rate"]),
        **norms,
        "skipped": int(metrics["skipped"]),
        "spikes": int(metrics["spikes"]),
    }


def mean_loss(total: float, count: float) -> float | None:
    """Nats a target; None without targets, or where it is not finite."""
    return finite(float(total / count)) if count else None


def finite(x: float) -> float | None:
    """`x`, or None if it is not finite: JSON knows no NaN."""
    return x if math.isfinite(x) else None
