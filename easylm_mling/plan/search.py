"""Which mesh, micro-batch and remat are fastest on a slice, within the config's global batch.

First every mesh with full remat and one sequence a chip at a time, which needs the least memory; then, for the fastest
that fit, more sequences; then, for the fastest of these, policies that keep more, each until one no longer fits. Every measurement is a line of DIR/measured.jsonl, under a key of what was
compiled, by which code and compiler: the same search again goes on where it was stopped.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from easylm_mling.config import REMAT_NAMES, ConfigError, RunConfig, to_tree
from easylm_mling.plan.measure import Measuring
from easylm_mling.plan.report import settings_text
from easylm_mling.plan.slices import GiB, find_slice

COMPILER_BYTES = 4 * GiB  # of this machine's memory: one compilation of the largest models here takes 3
FINALISTS = 3
MESHES = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))  # data and tensor shards of a slice
# Settings that the compiled step does not depend on.
_NOT_COMPILED = {"budget_tokens", "seed", "log_every_steps", "stop_at_step", "max_skipped_in_a_row"}


def search(config: RunConfig, folder: str, console: Console) -> list[tuple[RunConfig, dict]]:
    """Every config tried with its measurement (see measure.py), in no order. Raises ConfigError where none can be tried."""
    book = Book(Path(folder))
    tried = [c for c in (laid_out(config, data, tensor, 1) for data, tensor in MESHES) if c]
    if not tried:
        chips = find_slice(config.mesh.slice or "").chips
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} cannot be cut over the {chips} chips of mesh.slice={config.mesh.slice}; "
            f"use a multiple of {chips}"
        )
    book.measure(tried, console)
    count = find_slice(config.mesh.slice or "").count
    more = [
        laid_out(c, c.mesh.data // count, c.mesh.tensor, n) for c in fastest(tried, book)[:FINALISTS] for n in (2, 4)
    ]
    tried += [c for c in more if c]
    book.measure(tried, console)
    finalists = fastest(tried, book)[:FINALISTS]
    for remat in REMAT_NAMES[REMAT_NAMES.index("full") + 1 :]:
        richer = [with_train(c, remat=remat) for c in finalists]
        book.measure(richer, console)
        tried += richer
        finalists = [c for c, r in zip(finalists, richer, strict=True) if "times" in book.get(r)]
    return [(c, book.get(c)) for c in tried]


def fastest(configs: list[RunConfig], book: "Book") -> list[RunConfig]:
    fits = [c for c in configs if "times" in book.get(c)]
    return sorted(fits, key=lambda c: step_seconds(book.get(c)))


def laid_out(config: RunConfig, data: int, tensor: int, sequences: int) -> RunConfig | None:
    """The config with full remat, so many data and tensor shards in each slice (fsdp takes the rest) and `sequences` a chip
    at a time; None where something does not divide."""
    where, m = find_slice(config.mesh.slice or ""), config.model
    fsdp, left = divmod(where.chips // where.count, data * tensor)
    if left or m.hidden_size % fsdp or any(n % tensor for n in (m.num_attention_heads, m.intermediate_size)):
        return None
    mesh = dataclasses.replace(config.mesh, data=data * where.count, fsdp=fsdp, tensor=tensor)
    at_once = mesh.data * mesh.fsdp * sequences
    if config.train.batch_size % at_once:
        return None
    tried = with_train(config, accumulation_steps=config.train.batch_size // at_once, remat="full")
    return dataclasses.replace(tried, mesh=mesh)


def with_train(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def step_seconds(measured: dict) -> float:
    times = measured["times"]
    return times["matrix"] + times["other"] + times["attention"] + times["waiting"]


class Book:
    """The measurements of a directory."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.code = folder / "measured.jsonl", code_fingerprint()
        self.found: dict[str, dict] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a kill cut short
            self.found[entry["key"]] = entry["measured"]

    def get(self, config: RunConfig) -> dict:
        return self.found[self.key(config)]

    def key(self, config: RunConfig) -> str:
        tree = to_tree(config)
        train = {k: v for k, v in tree["train"].items() if k not in _NOT_COMPILED}
        data = [tree["data"]["sequence_length"], len(tree["data"]["sources"])]
        part = [tree["model"], train, tree["optimizer"], tree["mesh"], data, self.code]
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]

    def measure(self, configs: list[RunConfig], console: Console):
        """Measure those that are not known yet, as many at a time as this machine's processors and memory allow."""
        todo = [c for c in configs if self.key(c) not in self.found]
        at_once = max(1, min(len(os.sched_getaffinity(0)), available_memory() // COMPILER_BYTES))
        running: dict[str, tuple[RunConfig, Measuring]] = {}
        bar = Progress(
            TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[last]}"),
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
                            if not console.is_terminal:
                                console.print(outcome(config, measured), highlight=False, soft_wrap=True)
        finally:
            for _, measuring in running.values():
                measuring.close()

    def _put(self, key: str, measured: dict):
        self.found[key] = measured
        if "error" not in measured:  # those may be this machine's
            cut_short = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(("\n" if cut_short else "") + json.dumps({"key": key, "measured": measured}) + "\n")


def outcome(config: RunConfig, measured: dict) -> str:
    if "error" in measured:
        return f"{settings_text(config)}: {measured['error']}"
    if "does_not_fit" in measured:
        return f"{settings_text(config)}: does not fit"
    return f"{settings_text(config)}: {step_seconds(measured):.2f} s, {measured['memory']['peak'] / GiB:.1f} GiB"


def code_fingerprint() -> str:
    """Of this package and of the compiler: a measurement holds for these only."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    return " ".join([digest.hexdigest()[:16], *versions])


def available_memory() -> int:
    """Bytes that this machine can give to new processes."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo holds no MemAvailable: --search needs Linux")
