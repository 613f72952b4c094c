"""Where lines of metrics.jsonl go besides, if `log` asks for it: TensorBoard and Weights & Biases.

A thread feeds them from a bounded queue, so that training waits for none and outlives each: a sink that fails is told
once and left alone, and so are lines that find the queue full. metrics.jsonl has them all.
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
_KINDS = ("train", "eval")


def check_trackers(log: LogConfig):
    """Raise ConfigError for a sink whose package is not installed."""
    for wanted, key, package, extra in (
        (log.tensorboard, "log.tensorboard=true", "tensorboardX", "tensorboard"),
        (bool(log.wandb), f"log.wandb={log.wandb}", "wandb", "wandb"),
    ):
        if wanted and not find_spec(package):
            raise ConfigError(f"{key} needs {package}; install it with pip install 'easylm-mling[{extra}]'")


class Trackers:
    """Feeds what is `put` to the sinks of `config`. Within it only; leaving it gives them some seconds for the rest."""

    def __init__(self, config: RunConfig, run: Path, warn: Callable[[str], None]):
        makers: list[tuple[str, Callable[[], Any]]] = []
        if config.log.tensorboard:
            makers.append(("TensorBoard", lambda: TensorBoard(run / "tensorboard")))
        if config.log.wandb:
            makers.append(("wandb", lambda: WeightsAndBiases(config, run)))
        self._warn, self._full, self._over = warn, False, threading.Event()
        self._lanes = [(name, queue.Queue(_QUEUED)) for name, _ in makers]
        # A thread each, and daemons: one that hangs (a network that is down) holds up neither the other nor the end.
        self._threads = [
            threading.Thread(target=self._feed, args=(*lane, make), name=f"easylm-{name}", daemon=True)
            for lane, (name, make) in zip(self._lanes, makers, strict=True)
        ]

    def put(self, record: dict):
        """Never waits."""
        if record["kind"] not in _KINDS:
            return
        for name, lines in self._lanes:
            try:
                lines.put_nowait(record)
            except queue.Full:
                if not self._full:
                    self._warn(f"{name} cannot keep up: some lines go to metrics.jsonl only")
                self._full = True

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        until = time.monotonic() + _LAST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _feed(self, name: str, lines: queue.Queue, make: Callable[[], Any]):
        try:
            sink = make()
            while not (self._over.is_set() and lines.empty()):
                with suppress(queue.Empty):
                    record = lines.get(timeout=0.2)
                    sink.write(record["kind"], record["step"], record["time"], numbers(record))
            sink.close()
        except Exception as error:  # noqa: BLE001 - whatever a sink does wrong, training goes on
            self._warn(f"{name} gets no more lines ({' '.join(str(error).split())[:200]}); metrics.jsonl has them all")
            # Lines put from now on fill the queue once; no thread waits for them.
            self._full = True


def numbers(record: dict, before: str = "") -> dict[str, float]:
    """The numbers in a line by their path: `{"train/sources/ja": 2.1, ...}`."""
    found: dict[str, float] = {}
    before = before or f"{record['kind']}/"
    for key, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{before}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "time"):
            found[before + key] = value
    return found


class TensorBoard:
    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=30)

    def write(self, kind: str, step: int, when: float, values: dict[str, float]):
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=when)

    def close(self):
        self._writer.close()


class WeightsAndBiases:
    """One run of the project, named as the run's directory, which resumes when the run does. Files lie in RUN/wandb.

    Offline where WANDB_MODE says so or no key is found; `wandb sync` uploads them later. Of the config only numbers of
    the model and its training are sent: no path, no address, nothing of the environment.
    """

    def __init__(self, config: RunConfig, run: Path):
        import wandb  # pyright: ignore[reportMissingImports]

        tree = to_tree(config)
        weights = {name: source["weight"] for name, source in tree["data"]["sources"].items()}
        shown = {k: tree[k] for k in ("model", "train", "optimizer", "mesh")} | {"weights": weights}
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        quiet: Any = {"x_disable_meta": True, "x_disable_stats": True, "disable_git": True, "disable_code": True}
        self._run = wandb.init(
            project=config.log.wandb,
            name=config.run_dir.rstrip("/").rpartition("/")[2],
            id=blake2b(config.run_dir.encode(), digest_size=8).hexdigest(),
            resume="allow",
            dir=str(run),
            config=shown,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60, **quiet),
        )
        # A step that a resumed run does again would be dropped without a word if it were wandb's own step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, when: float, values: dict[str, float]):
        self._run.log({**values, "step": step})

    def close(self):
        self._run.finish()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai"))
    except (OSError, NetrcParseError):
        return False
