"""What a run tells while it runs: metrics.jsonl, which is the record, and the progress line."""

import math
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from easylm_mling.records import Records, read_records


class MetricsLog:
    """Appends one JSON object a line. A line is flushed at once: after a kill at most the last one is cut short."""

    def __init__(self, path: Path):
        self._records = Records(path)

    def write(self, kind: str, step: int, **values):
        self._records.append({"kind": kind, "step": step, "time": round(time.time(), 3), **values})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._records.close()


def read_metrics(path: Path, kind: str) -> list[dict]:
    """The lines of one kind in order of steps; where a resumed run wrote a step again, the later line counts."""
    by_step = {entry["step"]: entry for entry in read_events(path, kind)}
    return [by_step[step] for step in sorted(by_step)]


def read_events(path: Path, kind: str) -> list[dict]:
    """All lines of one kind in the order they were written."""
    return [entry for entry in read_records(path) if entry["kind"] == kind]


def step_metrics(metrics: dict, names: list[str]) -> dict:
    """The device's metrics of one step as plain numbers: the loss over all targets and over each source's."""
    sums, counts = np.asarray(metrics["loss_sum"], np.float64), np.asarray(metrics["loss_count"], np.float64)
    return {
        "loss": mean_loss(sums.sum(), counts.sum()),
        "sources": {n: mean_loss(s, c) for n, s, c in zip(names, sums, counts, strict=True) if c},
        "learning_rate": float(metrics["learning_rate"]),
        "gradient_norm": finite(float(metrics["gradient_norm"])),
        "skipped": int(metrics["skipped"]),
        "spikes": int(metrics["spikes"]),
    }


def mean_loss(total: float, count: float) -> float | None:
    """Nats a target, or None where there is none or it is not finite (JSON knows no NaN)."""
    return finite(float(total / count)) if count else None


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def make_console(quiet: bool = False) -> Console:
    """A terminal's own width; in a file or a pipe, room for the widest table."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(width=110, quiet=quiet)


class ProgressLine:
    """One line that follows the run: a bar on a terminal, a printed line every few seconds elsewhere."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, console: Console, total_steps: int, tokens_per_step: int, start_step: int):
        self.console, self.total, self.per_step = console, total_steps, tokens_per_step
        # Speed is measured from the second step of this process: the first one holds the compilation.
        self.first = start_step + 1
        self.since = self.printed = None
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=start_step, text="compiling")

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def update(self, step: int, loss: float | None) -> float | None:
        """Show that `step` is done; returns tokens a second so far in this process."""
        now = time.monotonic()
        if self.since is None:
            self.since = now
        rate = (step - self.first) * self.per_step / (now - self.since) if step > self.first else None
        left = (self.total - step) * self.per_step / rate if rate else None
        text = f"loss {'not finite' if loss is None else f'{loss:.4f}'}  {tokens_text(rate)} tokens/s  {duration_text(left)} left"
        self.bar.update(self.task, completed=step, text=text)
        due = self.printed is None or now - self.printed > self.SECONDS_BETWEEN_LINES or step == self.total
        if not self.console.is_terminal and due:
            self.printed = now
            self.console.print(f"step {step}/{self.total}  {text}", highlight=False)
        return rate


def tokens_text(n: float | None) -> str:
    """1234567 as '1.23M'."""
    if n is None:
        return "-"
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= scale:
            return f"{n / scale:.3g}{letter}"
    return f"{n:.3g}"


def duration_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h {m:02}m" if hours else f"{m}m {s:02}s"
