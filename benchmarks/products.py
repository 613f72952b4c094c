"""What products of 8 bits cost in learning: runs with them beside runs in bfloat16, on the same text from the same start.

    python benchmarks/products.py [--folder DIR] [--steps 300] [--seeds 0 1 2] [--kind int8] [override=value ...]

The demo's model learns the demo's corpora, on one CPU device and in bfloat16: without train.products, with them in the forward
pass, and with them in both. A seed decides the start and the order of the text, so the runs of one seed are pairs: what is
printed are held-out losses in nats a token, and the mean of their differences to bfloat16 with its standard error. Held-out
losses are computed without products of 8 bits, for all runs. What was done is not done again in the same --folder.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from easylm_mling.monitoring.metrics import read_metrics

ROWS, LENGTH = 8, 128
SETTINGS = (
    "mesh.cpu_devices=1", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", f"train.batch_size={ROWS}",
    "train.accumulation_steps=1", f"data.sequence_length={LENGTH}", "train.compute_dtype=bfloat16", "train.log_every_steps=20",
    "eval.every_steps=0", "eval.rows_per_source=64", "checkpoint.every_steps=100000", "optimizer.warmup=30 steps",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the runs stay (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kind", choices=("int8", "fp8"), default="int8")
    parser.add_argument("overrides", nargs="*")
    a = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    forward = [f"train.products.forward={a.kind}"]
    forms = {
        "bfloat16": [],
        f"{a.kind} forward": forward,
        f"{a.kind} forward and backward": [*forward, f"train.products.backward={a.kind}"],
    }
    with tempfile.TemporaryDirectory(prefix="benchmark_products_") as temporary:
        folder = Path(a.folder or temporary)
        losses: dict[str, list[float]] = {name: [] for name in forms}
        for seed in a.seeds:
            for name, settings in forms.items():
                seeded = [f"train.seed={seed}", f"data.seed={seed}"]
                run = folder / f"{name.replace(' ', '-')}-{seed}"
                losses[name].append(train(run, a.steps, [*seeded, *settings, *a.overrides]))
                print(f"seed {seed}, {name}: {losses[name][-1]:.4f}", flush=True)
    print(f"\n| products | held-out loss | difference to bfloat16 |\n|{'---|' * 3}")
    for name, of_seeds in losses.items():
        pairs = [loss - plain for loss, plain in zip(of_seeds, losses["bfloat16"], strict=True)]
        print(f"| {name} | {statistics.mean(of_seeds):.4f} | {mean_text(pairs) if any(pairs) else ''} |")


def train(run: Path, steps: int, settings: list[str]) -> float:
    """Train the demo for `steps` with `settings`, unless `run` has, and return its last held-out loss."""
    metrics, budget = run / "metrics.jsonl", f"train.budget_tokens={steps * ROWS * LENGTH}"
    if not metrics.is_file() or all(line["step"] < steps for line in read_metrics(metrics, "eval")):
        command = [sys.executable, "-m", "easylm_mling", "train", "configs/demo.yaml", f"run_dir={run}", *SETTINGS]
        subprocess.run([*command, budget, *settings], check=True, stdout=subprocess.DEVNULL)
    return read_metrics(metrics, "eval")[-1]["loss"]


def mean_text(values: list[float]) -> str:
    """Format the mean of `values` and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.4f} +- {error:.4f}"


if __name__ == "__main__":
    main()
