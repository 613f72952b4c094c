"""Real training processes on the sample corpora, one or several to a run, and what must not depend on how they ended."""

import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from easylm_mling.checkpoint.parameters import load_params
from easylm_mling.checkpoint.reading import load_data_state
from easylm_mling.config import load
from easylm_mling.model.sharding import make_mesh
from easylm_mling.monitoring.metrics import TIMINGS, read_metrics
from easylm_mling.run.train import train
from easylm_mling.storage.object_store import small_files
from easylm_mling.training.state import abstract_params

ROOT = Path(__file__).parent.parent
SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.head_dim=8",
    "data.sequence_length=32",
    "train.batch_size=8",
    "train.budget_tokens=2500",  # 10 steps of 256 tokens
    "optimizer.warmup=2 steps",
    "checkpoint.every_steps=4",
    "eval.every_steps=0",
    "eval.rows_per_source=2",
]
TINY = [*SMALL, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=1"]
# Of a whole run, on however many processes.
DEVICES = 4


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def xla_flags(devices: int = 0) -> str:
    """This process's XLA flags, with which another compiles programs of the same bits; 0 devices: as mesh.cpu_devices says."""
    count = f"--xla_force_host_platform_device_count={devices}" if devices else ""
    return re.sub(r"--xla_force_host_platform_device_count=\d+", count, os.environ["XLA_FLAGS"])


def start(
    run_dir: Path,
    processes: int,
    *overrides: str,
    only: int | None = None,
    port: int = 0,
    settings: Sequence[str] = TINY,
    devices: int = DEVICES,
    environment: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
    """The `processes` of one run (of them `only` one), each with its part of the devices. Their output goes to files."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(),
        # The next start finds all of this one's programs, the small ones too.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **(environment or {}),
    }
    # One process, too, joins with itself: on the CPU the sums of its own collectives have another order than gloo's.
    place = [f"--coordinator=localhost:{port or free_port()}", f"--processes={processes}"]
    flags = [o for o in overrides if o.startswith("--")]
    settings = [*settings, f"mesh.cpu_devices={devices // processes}", f"run_dir={run_dir}"]
    settings += [o for o in overrides if not o.startswith("--")]
    started = []
    for i in range(processes) if only is None else [only]:
        verb = [sys.executable, "-m", "easylm_mling", "train", "configs/demo.yaml"]
        command = [*verb, *settings, *place, *flags, f"--process-id={i}"]
        with open(output_of(run_dir, i), "ab") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        started.append(process)
    return started


def output_of(run_dir: Path, process: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}-process-{process}.txt")


def ends(run_dir: Path, processes: list[subprocess.Popen], seconds: float = 300) -> list[int]:
    """The exit codes; whatever has not ended in time is killed, and that is an error with all that was printed."""
    until = time.monotonic() + seconds
    try:
        return [p.wait(max(0.1, until - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not ended:\n{printed(run_dir)}") from None
    finally:
        for p in processes:
            p.kill()
            p.wait()


def printed(run_dir: Path) -> str:
    files = sorted(run_dir.parent.glob(f"{run_dir.name}-process-*.txt"))
    return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')}" for f in files)


def run(
    run_dir: Path,
    processes: int,
    *overrides: str,
    seconds: float = 120,
    environment: Mapping[str, str] | None = None,
):
    codes = ends(run_dir, start(run_dir, processes, *overrides, environment=environment), seconds)
    assert codes == [0] * processes, printed(run_dir)


def train_here(run_dir: Path, *overrides: str, max_hours: float | None = None) -> str:
    """One run in this process, on all its devices; returns what was printed."""
    os.chdir(ROOT)
    config = load(
        ["configs/demo.yaml"], [*TINY, "mesh.cpu_devices=0", "mesh.tensor=2", f"run_dir={run_dir}", *overrides]
    )
    printed = io.StringIO()
    assert train(config, Console(file=printed, width=1000), max_hours=max_hours) == 0
    return printed.getvalue()


def wait_for_step(processes: list[subprocess.Popen], run_dir: Path, step: int):
    """Until the log has `step`, or a process has ended."""
    metrics = run_dir / "metrics.jsonl"
    while all(p.poll() is None for p in processes):
        if metrics.exists() and any(x["step"] >= step for x in read_metrics(metrics, "train")):
            return
        time.sleep(0.005)


def outcome(run_dir: Path):
    """Everything that must not depend on how often a run was stopped, and on how many processes it ran."""
    lines = [
        {k: v for k, v in line.items() if k not in TIMINGS}
        for kind in ("train", "eval", "news", "languages")
        for line in read_metrics(small_files(run_dir) / "metrics.jsonl", kind)
        if kind != "languages" or line["step"] == 10
    ]
    config = load(["configs/demo.yaml"], [*TINY, "mesh.cpu_devices=0", f"run_dir={run_dir}", "mesh.tensor=2"])
    params = load_params(run_dir, abstract_params(config.model, make_mesh(config.mesh)))
    return lines, load_data_state(run_dir), jax.device_get(params)


def assert_same_bits(a, b):
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1:], b[1:])
