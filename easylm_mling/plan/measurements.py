"""Measure many configs side by side, and cache each measurement so that none is made twice."""

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
from easylm_mling.plan.slices import slice_of
from easylm_mling.plan.text import settings_text
from easylm_mling.storage.jsonl import JsonlWriter, read_jsonl

# Settings of training that a step does not depend on.
_OF_THE_WHOLE_RUN = ("budget_tokens", "budget_epochs", "counted_tokens", "seed")
COMPILER_BYTES = 4 * GiB  # of this machine's memory, for one compilation: those of the largest models here take 3


def step_seconds(measured: dict) -> float:
    """Return the step time, with all waiting."""
    times = measured["times"]
    return times["matrix"] + times["other"] + times["attention"] + times["waiting"]


def peak_bytes(measured: dict) -> float | None:
    """Return the peak of a chip's memory, also where it does not fit; None for an error."""
    if "does_not_fit" in measured:
        return measured["does_not_fit"]["needed"]
    return measured["memory"]["peak"] if "memory" in measured else None


def fits(config: RunConfig, measured: dict) -> bool:
    """Return True if it compiled, to a peak of at most `train.remat_memory` of the chip's memory."""
    limit = config.train.remat_memory * slice_of(config).chip.hbm_bytes
    return "times" in measured and measured["memory"]["peak"] <= limit


class MeasurementCache:
    """Measurements by config: in memory, and with a `folder` also in its measured.jsonl, for later commands.

    A key holds the fingerprint of this package and of the compiler, so no other version's measurement is ever used.
    """

    def __init__(self, folder: Path | None = None):
        self.path, self.code = folder and folder / "measured.jsonl", code_fingerprint()
        self._measured: dict[str, dict] = {}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        for line in read_jsonl(self.path) if self.path and self.path.exists() else ():
            self._measured[line["key"]] = line["measured"]

    def get(self, config: RunConfig) -> dict:
        """Return the measurement of a config that was measured."""
        return self._measured[self.key(config)]

    def key(self, config: RunConfig) -> str:
        """Return the digest of everything that the measurement depends on."""
        tree = to_tree(config)
        train = {k: v for k, v in step_settings(config.train).items() if k not in _OF_THE_WHOLE_RUN}
        data = [tree["data"]["sequence_length"], len(tree["data"]["sources"])]
        part = [tree["model"], train, tree["optimizer"], tree["mesh"], tree["lora"], data, self.code]
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]

    def measure(self, configs: list[RunConfig], console: Console, print_lines: bool = True):
        """Measure the configs that are not in the cache, as many at a time as processors and memory allow.

        Shows a progress bar on a terminal, and elsewhere one line for each config, if `print_lines`.
        """
        waiting = [c for c in configs if self.key(c) not in self._measured]
        at_once = max(1, min(len(os.sched_getaffinity(0)), available_memory() // COMPILER_BYTES))
        running: dict[str, tuple[RunConfig, Measuring]] = {}
        bar = Progress(
            TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[last]}", markup=False),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        task = bar.add_task("", total=len(configs), completed=len(configs) - len(waiting), last="")
        try:
            with bar:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        config = waiting.pop(0)
                        running[self.key(config)] = config, Measuring(config)
                    time.sleep(0.2)
                    for key, (config, measuring) in list(running.items()):
                        if (measured := measuring.result()) is not None:
                            del running[key]
                            measuring.close()
                            self._put(key, measured)
                            bar.update(task, advance=1, last=outcome(config, measured))
                            if print_lines and not console.is_terminal:
                                say(console, outcome(config, measured))
        finally:
            for _, measuring in running.values():
                measuring.close()

    def _put(self, key: str, measured: dict):
        self._measured[key] = measured
        if self.path and "error" not in measured:  # an error may be this machine's
            writer = JsonlWriter(self.path)
            writer.append({"key": key, "measured": measured})
            writer.close()


def fastest(configs: list[RunConfig], cache: MeasurementCache) -> list[RunConfig]:
    """Return the configs that fit, fastest first."""
    return sorted((c for c in configs if fits(c, cache.get(c))), key=lambda c: step_seconds(cache.get(c)))


def outcome(config: RunConfig, measured: dict) -> str:
    """Format one measurement as a line."""
    if "error" in measured:
        return f"{settings_text(config)}: {measured['error']}"
    if "does_not_fit" in measured:
        return f"{settings_text(config)}: does not fit"
    return f"{settings_text(config)}: {step_seconds(measured):.2f} s, {measured['memory']['peak'] / GiB:.1f} GiB"


def code_fingerprint() -> str:
    """Return the digest of this package and the versions of the compiler. Raises ConfigError without libtpu."""
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
    """Return the bytes of this machine's memory that new processes can have."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable; make plans on Linux")
