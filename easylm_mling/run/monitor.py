"""What a run says of itself while it trains. The loop says what happened; the monitor knows where that is written.

The first process of several tells; in the others the same calls write to nowhere.
"""

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from easylm_mling.config import ProfileConfig, RunConfig
from easylm_mling.distributed.agreement import is_primary
from easylm_mling.errors import without_secrets
from easylm_mling.monitoring.console import ProgressLine, say, sources_table, warn
from easylm_mling.monitoring.events import EventLog
from easylm_mling.monitoring.metrics import MetricsLog, step_metrics
from easylm_mling.monitoring.plan_comparison import compare_with_plan
from easylm_mling.monitoring.profiler import Profiler
from easylm_mling.monitoring.throughput import Throughput
from easylm_mling.monitoring.trackers import Trackers
from easylm_mling.run.directory import RunDirectory
from easylm_mling.training.spike_guard import SPIKE
from easylm_mling.training.step import jit_parameter_norm

SETTLED_STEPS = 20
_TABLE_SECONDS = 600.0
_NOWHERE = Path("/dev/null")
_PACKAGES = ("easylm-mling", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")


class Monitor:
    """A context manager. `begun`: when (time.monotonic) the process's work began, before there was a run directory."""

    def __init__(self, config: RunConfig, run: RunDirectory, mesh: Mesh, console: Console, begun: float):
        self.config, self.run, self.console = config, run, console
        self.throughput, self._mesh, self._begun = Throughput(config, mesh), mesh, begun
        profile = config.profile if is_primary() else ProfileConfig()
        self.profile = Profiler(profile, run.path / "profile", lambda text: say(console, text))
        self._norm = jit_parameter_norm(config, mesh)
        self._stack = ExitStack()
        self._launched: tuple[int, float] | None = None
        # When the last save was committed, and how long it held up the loop.
        self._saved: tuple[float, float] | None = None
        self._held_out: dict | None = None
        self._table_due = time.monotonic() + _TABLE_SECONDS

    def __enter__(self):
        run, first = self.run, is_primary()
        trackers = self._stack.enter_context(Trackers(self.config, run.path, self.warn)) if first else None
        self.log = self._stack.enter_context(MetricsLog(run.metrics_file if first else _NOWHERE, trackers))
        self.events = self._stack.enter_context(EventLog(run.events_file if first else _NOWHERE))
        seconds = round(time.monotonic() - self._begun, 3)
        self.events.write("start", self.events.step, seconds=seconds, **environment(self._mesh))
        return self

    def __exit__(self, *error):
        self.profile.close()
        return self._stack.__exit__(*error)

    def warn(self, text: str):
        warn(self.console, text)

    def begin(self, step: int):
        """Steps from `step` + 1 on will follow."""
        per_step, total = self.config.tokens_per_step, self.config.total_steps
        self._progress = self._stack.enter_context(ProgressLine(self.console, total, per_step, step))

    @contextmanager
    def compiling(self, step: int) -> Iterator[None]:
        """The program is waited for in it; `step` is the first one that it will run."""
        begun = time.monotonic()
        yield
        self.events.write("compiled", step, seconds=round(time.monotonic() - begun, 3))

    def launching(self, step: int):
        """The step is about to be launched."""
        self.profile.before(step)
        self._launched = self._launched or (step, time.monotonic())

    def norms(self, step: int, params: dict) -> dict:
        """What the device is to tell of a logged step besides the step's own metrics."""
        return {"parameter_norm": self._norm(params)} if step % self.config.train.log_every_steps == 0 else {}

    def finished(self, step: int, metrics: dict, ledger: Callable[[], dict]) -> dict:
        """Tell of a step whose `metrics` have arrived; `ledger`: what was consumed up to it. Returns them as plain numbers."""
        values, config = step_metrics(metrics, list(self.config.data.sources)), self.config
        self.profile.after(step)
        if self._launched and self._launched[0] == step:
            self.events.write("first_step", step, seconds=round(time.monotonic() - self._launched[1], 3))
            self.throughput.measure(step)
        if in_a_row := int(metrics["skipped_in_a_row"]):
            why = "spike" if int(metrics["verdict"]) == SPIKE else "not_finite"
            self.events.write("skipped", step, in_a_row=in_a_row, why=why)
        self.events.progress(step)
        logged = step % config.train.log_every_steps == 0
        measured = self.throughput.measure(step) if logged else {}
        left = self._progress.update(step, values["loss"], measured.get("mfu"))
        if logged:
            values |= {
                "ledger": ledger(),
                **measured,
                **self._since_save(),
                "goodput": _rounded(self.events.goodput.share()),
            }
            values["seconds_to_budget"] = left and round(left, 1)
            self.log.write("train", step, tokens=step * config.tokens_per_step, **values)
            if is_primary() and time.monotonic() >= self._table_due and step < config.total_steps:
                self.console.print(sources_table(step, values, self._held_out))
                self._table_due = time.monotonic() + _TABLE_SECONDS
        if self._launched and step == self._launched[0] + SETTLED_STEPS - 1:
            self.tell_speed()
        return values

    def evaluated(self, step: int, found: dict, seconds: float):
        self.log.write("eval", step, **found)
        self.events.write("evaluated", step, seconds=round(seconds, 3))
        self._held_out = found
        if step:
            self._table_due = 0.0

    def restored(self, step: int, seconds: float):
        self.events.write("restored", step, seconds=round(seconds, 3))

    def news(self, step: int, lines: list[str]):
        """What became of sources, and why the step was skipped, a line each."""
        if lines:
            self.log.write("news", step, news=lines)
        for line in lines:
            say(self.console, f"step {step}: {line}")

    def saved(self, step: int, seconds: float, size: int):
        """The checkpoint of `step`, of `size` bytes, is committed; the loop stood still for `seconds` of it."""
        self.events.write("saved", step, seconds=round(seconds, 3), bytes=size)
        self._saved = time.monotonic(), round(seconds, 3)

    def save_failed(self, step: int, problem: str, in_a_row: int):
        self.events.write("save_failed", step, problem=without_secrets(problem), in_a_row=in_a_row)
        self.warn(f"step {step}: a checkpoint could not be saved: {problem}")

    def ended(self, event: str, step: int, why: str):
        """How it ended; the last save is finished."""
        self._progress.close()
        self.events.write(event, step, **({"why": why} if why else {}))
        self.tell_speed()

    def stuck(self, what: str, code: int):
        """The process will end at once, from another thread, with this exit code."""
        with suppress(OSError):
            self.events.failed(what, code=code)
            self.run.push()

    def tell_speed(self):
        """Step time, MFU and peak memory beside what `plan --keep` said of this run, where something is there to compare."""
        if not is_primary():
            return
        device = self.throughput.device
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if line := compare_with_plan(self.run.path, self.config, device.device_kind, self.throughput.chips, memory):
            say(self.console, line)

    def _since_save(self) -> dict[str, float]:
        if self._saved is None:
            return {}
        age = round(time.monotonic() - self._saved[0], 1)
        return {"checkpoint_seconds": self._saved[1], "checkpoint_age_seconds": age}


def environment(mesh: Mesh) -> dict:
    """What the run trains on and with: nothing of names, paths or the environment's variables."""
    versions = {"python": platform.python_version(), "system": sys.platform}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = mesh.devices.flat[0]
    return {
        "hosts": jax.process_count(),
        "devices": mesh.size,
        "device_kind": device.device_kind,
        "mesh": {str(k): v for k, v in mesh.shape.items()},
        "versions": versions,
    }


def _rounded(x: float | None) -> float | None:
    return None if x is None else round(x, 4)
