"""Measurements of many configs: made side by side, and kept, so that none is made twice."""

import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from easylm_mling.config import RunConfig, step_settings, to_tree
from easylm_mling.errors import ConfigError
from easylm_mling.hardware import GiB
from easylm_mling.monitoring.console import say
from easylm_mling.plan.measure import Measuring
from easylm_mling.plan.slices import find_slice
from easylm_mling.plan.text import settings_text
from easylm_mling.storage.jsonl import JsonlWriter, read_jsonl

COMPILER_BYTES = 4 * GiB  # of this machine's memory: one compilation of the largest models here takes 3


def step_seconds(measured: dict) -> float:
    times = measured["times"]
    return times["matrix"] + times["other"] + times["attention"] + times["waiting"]


def peak_bytes(measured: dict) -> float | None:
    """Of a chip's memory, also of what does not fit; None where nothing is known."""
    if "does_not_fit" in measured:
        return measured["does_not_fit"]["needed"]
    return measured["memory"]["peak"] if "memory" in measured else None


def fits(config: RunConfig, measured: dict) -> bool:
    """Whether it compiled, to a peak of at most `train.remat_memory` of the chip's memory."""
    limit = config.train.remat_memory * find_slice(config.mesh.slice or "").chip.hbm_bytes
    return "times" in measured and measured["memory"]["peak"] <= limit


class MeasurementCache:
    """The measurements of one process, or of every one that was given the same `folder`: a line each of measured.jsonl."""

    def __init__(self, folder: Path | None = None):
        self.path, self.code = folder and folder / "measured.jsonl", code_fingerprint()
        self.found: dict[str, dict] = {}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        for entry in read_jsonl(self.path) if self.path and self.path.exists() else ():
            self.found[entry["key"]] = entry["measured"]

    def get(self, config: RunConfig) -> dict:
        return self.found[self.key(config)]

    def key(self, config: RunConfig) -> str:
        tree = to_tree(config)
        train = {k: v for k, v in step_settings(config.train).items() if k not in ("budget_tokens", "seed")}
        data = [tree["data"]["sequence_length"], len(tree["data"]["sources"])]
        part = [tree["model"], train, tree["optimizer"], tree["mesh"], data, self.code]
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]

    def measure(self, configs: list[RunConfig], console: Console, tell: bool = True):
        """Measure those that are not known yet, as many at a time as this machine's processors and memory allow.

        `tell`: print a line for each where there is no terminal for a progress bar.
        """
        todo = [c for c in configs if self.key(c) not in self.found]
        at_once = max(1, min(len(os.sched_getaffinity(0)), available_memory() // COMPILER_BYTES))
        running: dict[str, tuple[RunConfig, Measuring]] = {}
        bar = Progress(
            TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[last]}", markup=False),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        task = bar.add_task("", total=len(configs), completed=len(configs) - len(todo), last="")
        try:
            with bar:
                while todo or running:
                    while todo and len(running) < at_once:
                        config = todo.pop(0)
                        running[self.key(config)] = config, Measuring(config)
                    time.sleep(0.2)
                    for key, (config, measuring) in list(running.items()):
                        if (measured := measuring.result()) is not None:
                            del running[key]
                            measuring.close()
                            self._put(key, measured)
                            bar.update(task, advance=1, last=outcome(config, measured))
                            if tell and not console.is_terminal:
                                say(console, outcome(config, measured))
        finally:
            for _, measuring in running.values():
                measuring.close()

    def _put(self, key: str, measured: dict):
        self.found[key] = measured
        if self.path and "error" not in measured:  # errors may be this machine's
            records = JsonlWriter(self.path)
            records.append({"key": key, "measured": measured})
            records.close()


def fastest(configs: list[RunConfig], book: MeasurementCache) -> list[RunConfig]:
    """Those that fit, fastest first."""
    return sorted((c for c in configs if fits(c, book.get(c))), key=lambda c: step_seconds(book.get(c)))


def outcome(config: RunConfig, measured: dict) -> str:
    if "error" in measured:
        return f"{settings_text(config)}: {measured['error']}"
    if "does_not_fit" in measured:
        return f"{settings_text(config)}: does not fit"
    return f"{settings_text(config)}: {step_seconds(measured):.2f} s, {measured['memory']['peak'] / GiB:.1f} GiB"


def code_fingerprint() -> str:
    """Of this package and of the compiler: a measurement holds for these only. Raises ConfigError without libtpu."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(file.read_bytes())
    try:
        versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "plans need the TPU compiler, libtpu; install it with pip install 'easylm-mling[tpu]'"
        ) from None
    return " ".join([digest.hexdigest()[:16], *versions])


def available_memory() -> int:
    """Bytes that this machine can give to new processes."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo holds no MemAvailable: plans are made on Linux")
