"""Checkpoints: how long a save keeps the loop of the demo waiting; saving and restoring beside raw writes and reads.

    python benchmarks/checkpoint.py [--gigabytes 1] [--rounds 3] [--folder DIR]

All is measured in one run, in turns, so that the ratios hold on a machine that others use, too: each round saves a state,
restores it (its digests compared, as a resume does), writes the same bytes raw (one file after another of 400 MB, then
fsync) and reads them. Pages of the files are dropped from memory before every read.
"""

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from rich.console import Console  # noqa: E402

from easylm_mling.checkpoint.checkpoint import Checkpoints  # noqa: E402
from easylm_mling.config import load  # noqa: E402
from easylm_mling.data.mixture import initial_state  # noqa: E402
from easylm_mling.monitoring.metrics import read_metrics  # noqa: E402
from easylm_mling.run.saving import Saver  # noqa: E402
from easylm_mling.run.train import train  # noqa: E402
from easylm_mling.training.digests import digests  # noqa: E402
from easylm_mling.training.state import TrainState  # noqa: E402

FILE = 400_000_000


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        demo(Path(folder) / "demo")
        throughput(Path(folder), a.gigabytes, a.rounds)


def demo(run_dir: Path):
    """The demo's model and batches, a save every 5 steps of 40."""
    blocked, save = [], Saver.save

    def timed(saver: Saver, state: TrainState, *args, **kwargs):
        jax.block_until_ready(state)
        began = time.perf_counter()
        save(saver, state, *args, **kwargs)
        blocked.append(time.perf_counter() - began)

    Saver.save = timed
    overrides = [f"run_dir={run_dir}", "train.stop_at_step=40", "checkpoint.every_steps=5", "eval.every_steps=0"]
    train(load(["configs/demo.yaml"], overrides), Console(file=io.StringIO()))
    lines = read_metrics(run_dir / "metrics.jsonl", "train")
    steps = [b["time"] - a["time"] for a, b in zip(lines[5:], lines[6:], strict=False) if b["step"] % 5 not in (0, 1)]
    # The first compiles the digests.
    block, step = statistics.median(blocked[1:]), statistics.median(steps)
    print(
        f"demo: a save keeps the loop {1000 * block:.1f} ms; a step takes {1000 * step:.0f} ms: {block / step:.1%} of it"
    )


def throughput(folder: Path, gigabytes: float, rounds: int):
    state = big_state(int(gigabytes * 1e9))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    digests(state)  # compiles
    data = initial_state(8, 4, range(8))._asdict()
    raw = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    seconds_of: dict[str, list[float]] = {}
    for n in range(rounds):
        with Checkpoints(folder / "run", keep_last=1) as checkpoints:
            now = state._replace(step=state.step + n + 1)
            timed(seconds_of, "digests", lambda: digests(now))  # noqa: B023
            timed(seconds_of, "blocked", lambda: checkpoints.save(now, data, {}))  # noqa: B023
            timed(seconds_of, "save", checkpoints.wait, seconds_of["blocked"][-1])
            timed(seconds_of, "raw write", lambda: write(folder / "raw", raw))
            drop(folder)
            timed(seconds_of, "restore", lambda: jax.block_until_ready(checkpoints.restore(n + 1, abstract(now))[0]))  # noqa: B023
            timed(seconds_of, "raw read", lambda: read(folder / "raw", size))
            shutil.rmtree(folder / "raw")
    for name, seconds in seconds_of.items():
        print(f"{name:10}" + "".join(f"{size / s / 1e6:8.0f}" for s in seconds) + " MB/s")
    # On an accelerator the digests are computed where the arrays are; here they take the processor from the writing.
    for name in ("save", "restore"):
        seconds_of[f"{name} less digests"] = [
            s - d for s, d in zip(seconds_of[name], seconds_of["digests"], strict=True)
        ]
    for ours, theirs in (
        ("save", "raw write"),
        ("save less digests", "raw write"),
        ("restore", "raw read"),
        ("restore less digests", "raw read"),
    ):
        ratios = [t / o for o, t in zip(seconds_of[ours], seconds_of[theirs], strict=True)]
        print(
            f"{ours} / {theirs}: {statistics.median(ratios):.2f} (of rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
        )


def big_state(size: int) -> TrainState:
    """`size` bytes of parameters and two moments, on 8 devices, in stacks of layers."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    layers, each = 8, NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    rows = max(8, size // 12 // 4 // layers // 1024 // 8 * 8)

    def tree(seed):
        names = ("q", "k", "v", "o")
        keys = jax.random.split(jax.random.key(seed), len(names))
        made = jax.jit(lambda key: jax.random.normal(key, (layers, rows, 1024)), out_shardings=each)
        return {"layers": {name: made(key) for name, key in zip(names, keys, strict=True)}}

    zero = jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec()))
    return TrainState(zero, tree(0), {"first": tree(1), "second": tree(2)}, zero, zero, zero, zero)


def abstract(state: TrainState):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def timed(seconds_of: dict, name: str, call, more: float = 0.0):
    began = time.perf_counter()
    call()
    seconds_of.setdefault(name, []).append(time.perf_counter() - began + more)


def write(folder: Path, raw: np.ndarray):
    folder.mkdir()
    for n in range(0, raw.size, FILE):
        with open(folder / str(n), "wb") as file:
            file.write(raw[n : n + FILE].data)
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path, size: int):
    into = np.empty(size, np.uint8)
    at = 0
    for file in sorted(folder.iterdir(), key=lambda f: int(f.name)):
        with open(file, "rb", buffering=0) as opened:
            while got := opened.readinto(into[at:].data):
                at += got
    assert at == size


def drop(folder: Path):
    """Out of memory with all files' pages, so that reads come from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
