"""What a run says of itself while it trains. The loop says what happened; the monitor knows where that is written.

Only the first of several processes writes. In the others the same calls write to nowhere.
"""

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from easylm_mling.config import ProfileConfig, RunConfig
from easylm_mling.distributed.agreement import is_primary
from easylm_mling.errors import without_secrets
from easylm_mling.model.sharding import axis_sizes
from easylm_mling.monitoring.console import ProgressLine, say, sources_table, warn
from easylm_mling.monitoring.events import EventLog
from easylm_mling.monitoring.metrics import MetricsLog, step_metrics
from easylm_mling.monitoring.plan_comparison import compare_with_plan
from easylm_mling.monitoring.profiler import Profiler
from easylm_mling.monitoring.throughput import Throughput
from easylm_mling.monitoring.trackers import Trackers
from easylm_mling.run.directory import RunDirectory
from easylm_mling.training.spike_guard import NOT_FINITE, SPIKE
from easylm_mling.training.step import jit_parameter_norm

# The speed is compared with the plan's after so many steps.
_SETTLED_STEPS = 20
_TABLE_SECONDS = 600.0
_NOWHERE = Path("/dev/null")
_PACKAGES = ("easylm-mling", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")


class Monitor:
    """A run's metrics, events, console and profiler. `Monitor.open` makes one."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        mesh: Mesh,
        console: Console,
        log: MetricsLog,
        events: EventLog,
        progress: ProgressLine,
        profiler: Profiler,
    ):
        self.console, self.log, self.events = console, log, events
        self.throughput = Throughput(config, mesh)
        self._config, self._run, self._progress, self._profiler = config, run, progress, profiler
        self._parameter_norm = jit_parameter_norm(config, mesh)
        # The first step of this process and when it was launched; the last checkpoint's time and how long the loop stood still.
        self._first: tuple[int, float] | None = None
        self._last_save: tuple[float, float] | None = None
        self._held_out: dict | None = None
        self._table_due = time.monotonic() + _TABLE_SECONDS

    @classmethod
    @contextmanager
    def open(
        cls, config: RunConfig, run: RunDirectory, mesh: Mesh, console: Console, begun: float
    ) -> Iterator["Monitor"]:
        """Open the run's logs and trackers, and write its start event. An error that leaves this writes `failed`.

        `begun` is when the process began its work (time.monotonic), before there was a run directory.
        """
        primary = is_primary()
        with ExitStack() as stack:
            trackers = stack.enter_context(Trackers(config, run.path, partial(warn, console))) if primary else None
            log = stack.enter_context(MetricsLog(run.metrics_file if primary else _NOWHERE, trackers))
            events = stack.enter_context(EventLog(run.events_file if primary else _NOWHERE))
            progress = stack.enter_context(ProgressLine(console, config.total_steps, config.tokens_per_step))
            profile = config.profile if primary else ProfileConfig()
            profiler = stack.enter_context(Profiler(profile, run.path / "profile", partial(say, console)))
            seconds = round(time.monotonic() - begun, 3)
            events.write("start", events.step, seconds=seconds, **environment(mesh, config.mesh.sequence))
            yield cls(config, run, mesh, console, log, events, progress, profiler)

    def begin(self, step: int):
        """Show the run's progress: steps from `step` + 1 on follow."""
        self._progress.begin(step)

    def restored(self, step: int, seconds: float):
        """Write that the run goes on from the checkpoint of `step`, which took `seconds` to read."""
        self.events.write("restored", step, seconds=round(seconds, 3))

    @contextmanager
    def compiling(self, step: int) -> Iterator[None]:
        """Measure the wait for the compiled program within it. `step` is the first one that it will run."""
        begun = time.monotonic()
        yield
        self.events.write("compiled", step, seconds=round(time.monotonic() - begun, 3))

    def launching(self, step: int):
        """Call it right before `step` is launched."""
        self._profiler.before(step)
        self._first = self._first or (step, time.monotonic())

    def norms(self, step: int, params: dict) -> dict[str, jax.Array]:
        """The metrics of a logged step that its program does not compute itself, still on the device. Collective."""
        return {"parameter_norm": self._parameter_norm(params)} if self._is_logged(step) else {}

    def step(self, step: int, metrics: dict, ledger: Callable[[], dict]) -> dict:
        """Write and show a finished step, and return its `metrics` as plain numbers.

        `ledger` gives what was consumed of each source up to this step; it is called for logged steps only.
        """
        values = step_metrics(metrics, list(self._config.data.sources))
        self._profiler.after(step)
        assert self._first is not None, "a step ends after it was launched"
        first, launched = self._first
        if step == first:
            self.events.write("first_step", step, seconds=round(time.monotonic() - launched, 3))
            self.throughput.measure(step)
        if in_a_row := int(metrics["skipped_in_a_row"]):
            why = "spike" if int(metrics["verdict"]) == SPIKE else "not_finite"
            self.events.write("skipped", step, in_a_row=in_a_row, why=why)
        self.events.progress(step)
        measured = self.throughput.measure(step) if self._is_logged(step) else {}
        left = self._progress.update(step, values["loss"], measured.get("mfu"))
        if self._is_logged(step):
            values |= {"ledger": ledger(), **measured, **self._checkpoint_age()}
            share = self.events.goodput.share()
            values |= {"goodput": share and round(share, 4), "seconds_to_budget": left and round(left, 1)}
            self.log.write("train", step, tokens=self._config.step_tokens.at(step), **values)
            self._show_table(step, values)
        if step == first + _SETTLED_STEPS - 1:
            self._compare_with_plan()
        return values

    def news(self, step: int, lines: list[str]):
        """Write and show what became of the sources at `step`, or why it was skipped."""
        if lines:
            self.log.write("news", step, news=lines)
        for line in lines:
            say(self.console, f"step {step}: {line}")

    def evaluated(self, step: int, losses: dict, seconds: float):
        """Write held-out losses as run/validation.py gives them, and show them soon. They took `seconds`."""
        self.log.write("eval", step, **losses)
        self.events.write("evaluated", step, seconds=round(seconds, 3))
        self._held_out = losses
        if step:
            self._table_due = 0.0

    def scored(self, step: int, scores: dict, seconds: float):
        """Write and show scores on tasks as run/task_scores.py gives them. They took `seconds`."""
        self.events.write("scored", step, seconds=round(seconds, 3))
        goodput = self.events.goodput
        share = goodput.seconds["tasks"] / (goodput.total() or 1.0)
        self.log.write("tasks", step, **scores, seconds=round(seconds, 3), share_of_run=round(share, 5))
        if not scores:  # of another process
            return
        bits, centred = (scores[key] for key in ("bits_per_byte", "centred_accuracy"))
        shown = [f"{bits:.4f} bits a byte of right answers"] if bits is not None else []
        shown += [f"centred accuracy {centred:+.3f}"] if centred is not None else []
        line = f"step {step}: {', '.join(shown) or 'no score'} on {self._config.eval.suite}"
        say(self.console, f"{line} ({seconds:.1f} s; {share:.1%} of the run's time so far goes into it)")

    def saved(self, step: int, blocked_seconds: float, size_bytes: int):
        """Write that the checkpoint of `step` is whole. The loop stood still for `blocked_seconds` of the save."""
        seconds = round(blocked_seconds, 3)
        self.events.write("saved", step, seconds=seconds, bytes=size_bytes)
        self._last_save = (time.monotonic(), seconds)

    def save_failed(self, step: int, problem: str, in_a_row: int):
        """Write and show that the checkpoint of `step` was not saved, the last of `in_a_row`."""
        self.events.write("save_failed", step, problem=without_secrets(problem), in_a_row=in_a_row)
        warn(self.console, f"step {step}: a checkpoint could not be saved: {problem}")

    def ended(self, event: str, step: int, why: str):
        """Write how this process's part of the run ended (monitoring/events.py), and show how fast it was."""
        self._progress.close()
        self.events.write(event, step, **({"why": why} if why else {}))
        self._compare_with_plan()

    def stuck(self, what: str, code: int):
        """Write that the process ends at once with exit code `code`. Any thread may call it."""
        with suppress(OSError):
            self.events.failed(what, code=code)
            self._run.push()

    def _is_logged(self, step: int) -> bool:
        return step % self._config.train.log_every_steps == 0

    def _show_table(self, step: int, values: dict):
        if is_primary() and time.monotonic() >= self._table_due and step < self._config.total_steps:
            self.console.print(sources_table(step, values, self._held_out))
            self._table_due = time.monotonic() + _TABLE_SECONDS

    def _compare_with_plan(self):
        """Show step time, MFU and peak memory beside those of the run's plan, where there is something to compare."""
        if not is_primary():
            return
        device, devices = self.throughput.device, self.throughput.devices
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if line := compare_with_plan(self._run.path, self._config, device.device_kind, devices, memory):
            say(self.console, line)

    def _checkpoint_age(self) -> dict[str, float]:
        if self._last_save is None:
            return {}
        saved, blocked_seconds = self._last_save
        return {"checkpoint_seconds": blocked_seconds, "checkpoint_age_seconds": round(time.monotonic() - saved, 1)}


def environment(mesh: Mesh, sequence: int) -> dict:
    """Devices and versions of the software: no names, paths or variables of the machine."""
    versions = {"python": platform.python_version(), "system": sys.platform}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = mesh.devices.flat[0]
    return {
        "hosts": jax.process_count(),
        "devices": mesh.size,
        "device_kind": device.device_kind,
        "mesh": axis_sizes(mesh, sequence),
        "versions": versions,
    }


def skip_news(metrics: dict, values: dict, sigmas: float) -> str:
    """Why the step changed nothing, "" if it did."""
    verdict = int(metrics["verdict"])
    if verdict == SPIKE:
        limits = zip(("loss", "gradient_norm"), map(float, metrics["limits"]), strict=True)
        over = [f"{name} {values[name]:.4g} is over {limit:.4g}" for name, limit in limits if values[name] > limit]
        return f"skipped, a spike: {' and '.join(over)}, {sigmas:g} deviations above the mean of the last steps"
    return "skipped: the loss or gradient is not finite" if verdict == NOT_FINITE else ""
