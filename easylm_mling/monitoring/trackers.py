"""Where lines of metrics.jsonl go besides, if `log` asks for it: TensorBoard and Weights & Biases.

A thread feeds each tracker from a bounded queue, so that training never waits. A tracker that fails is reported once and
left alone, and lines that meet a full queue are dropped: metrics.jsonl has them all.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from easylm_mling.config import LogConfig, RunConfig, to_tree
from easylm_mling.errors import ConfigError

_QUEUED, _LAST_SECONDS = 1000, 10.0
_KINDS = ("train", "eval", "tasks")


def check_trackers(log: LogConfig):
    """Raise ConfigError for a tracker whose package is not installed."""
    for wanted, key, package, extra in (
        (log.tensorboard, "log.tensorboard=true", "tensorboardX", "tensorboard"),
        (bool(log.wandb), f"log.wandb={log.wandb}", "wandb", "wandb"),
    ):
        if wanted and not find_spec(package):
            raise ConfigError(f"{key} needs {package}; install it with pip install 'easylm-mling[{extra}]'")


class Trackers:
    """Feeds lines to the trackers of `config.log`. A context manager; leaving it gives them some seconds for the rest."""

    def __init__(self, config: RunConfig, run: Path, warn: Callable[[str], None]):
        makers: dict[str, Callable[[], Any]] = {}
        if config.log.tensorboard:
            makers["TensorBoard"] = lambda: TensorBoard(run / "tensorboard")
        if config.log.wandb:
            makers["wandb"] = lambda: WeightsAndBiases(config, run)
        self._warn, self._warned_of_full, self._closing = warn, False, threading.Event()
        self._queues = {name: queue.Queue(_QUEUED) for name in makers}
        # Daemons: one that hangs (a network that is down) holds up neither the other nor the end.
        self._threads = [
            threading.Thread(target=self._feed, args=(name, make), name=f"easylm-{name}", daemon=True)
            for name, make in makers.items()
        ]

    def put(self, line: dict):
        """Queue a line of metrics.jsonl for every tracker; never waits."""
        if line["kind"] not in _KINDS:
            return
        for name, lines in self._queues.items():
            try:
                lines.put_nowait(line)
            except queue.Full:
                if not self._warned_of_full:
                    self._warn(f"{name} cannot keep up: some lines go to metrics.jsonl only")
                self._warned_of_full = True

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        until = time.monotonic() + _LAST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _feed(self, name: str, make: Callable[[], Any]):
        lines = self._queues[name]
        try:
            tracker = make()
            while not (self._closing.is_set() and lines.empty()):
                with suppress(queue.Empty):
                    line = lines.get(timeout=0.2)
                    tracker.write(line["step"], line["time"], numbers(line))
            tracker.close()
        except Exception as error:  # noqa: BLE001 - whatever a tracker does wrong, training goes on
            self._warn(f"{name} gets no more lines ({' '.join(str(error).split())[:200]}); metrics.jsonl has them all")
            # Nobody empties the queue any more; that it fills is no news.
            self._warned_of_full = True


def numbers(line: dict, prefix: str = "") -> dict[str, float]:
    """The numbers in a line by their path: `{"train/sources/ja": 2.1, ...}`."""
    values: dict[str, float] = {}
    prefix = prefix or f"{line['kind']}/"
    for key, value in line.items():
        if isinstance(value, dict):
            values |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "time"):
            values[prefix + key] = value
    return values


class TensorBoard:
    """Event files in `folder`, a scalar for each number."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=30)

    def write(self, step: int, when: float, values: dict[str, float]):
        """Add `values` at `step`; `when` is in seconds since 1970."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=when)

    def close(self):
        """Write out what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """One run of the project, named like the run's directory, which resumes when the run does. Files lie in RUN/wandb.

    It is offline if WANDB_MODE says so or there is no key; `wandb sync` uploads it later. Of the config only numbers of
    the model and its training are sent: no path, no address, nothing of the environment.
    """

    def __init__(self, config: RunConfig, run: Path):
        import wandb  # pyright: ignore[reportMissingImports]

        tree = to_tree(config)
        weights = {name: source["weight"] for name, source in tree["data"]["sources"].items()}
        sent = {k: tree[k] for k in ("model", "train", "optimizer", "mesh")} | {"weights": weights}
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        quiet: Any = {"x_disable_meta": True, "x_disable_stats": True, "disable_git": True, "disable_code": True}
        self._run = wandb.init(
            project=config.log.wandb,
            name=config.run_dir.rstrip("/").rpartition("/")[2],
            id=blake2b(config.run_dir.encode(), digest_size=8).hexdigest(),
            resume="allow",
            dir=str(run),
            config=sent,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60, **quiet),
        )
        # A step that a resumed run does again is dropped without a word if wandb counts the steps itself.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, when: float, values: dict[str, float]):
        """Log `values` at `step`; wandb takes the time itself."""
        self._run.log({**values, "step": step})

    def close(self):
        """Upload the rest, or leave it for `wandb sync`."""
        self._run.finish()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai"))
    except (OSError, NetrcParseError):
        return False
