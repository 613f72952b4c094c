"""What was predicted beside what a run measured, and the factor between them for the next plan.

RUN/plan.json is the plan that `plan --keep` left; RUN/calibration.json is what `plan --calibrate RUN` made of it.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from easylm_mling.atomic import write_whole
from easylm_mling.bucket import Bucket, is_bucket, run_files
from easylm_mling.config import ConfigError, RunConfig, load
from easylm_mling.metrics import read_metrics
from easylm_mling.model_flops import model_flops
from easylm_mling.plan.slices import CHIPS, GiB

PLAN_FILE, CALIBRATION_FILE = "plan.json", "calibration.json"
_FEWEST_STEPS, _LAST_LINES = 5, 200


def calibrate(run_dir: str, make_plan: Callable[[RunConfig], dict]) -> tuple[float, list[str]]:
    """(measured over predicted step time, what to tell) for the run in `run_dir`; kept in its calibration.json.

    A run without a plan is planned with `make_plan`. Raises ConfigError where there is too little to compare.
    """
    run = run_files(run_dir)
    measured = measured_step(run / "metrics.jsonl")
    if measured is None:
        raise ConfigError(f"{run_dir}: fewer than {_FEWEST_STEPS} steps in metrics.jsonl; let it train on first")
    plan = read_plan(run) or make_plan(load([str(run / "config.yaml")]))
    if "step" not in plan:
        raise ConfigError(
            f"{run_dir}: its plan does not fit the slice; plan it again with the mesh.slice that it ran on"
        )
    predicted = plan["step"]["seconds"] / plan["step"]["factor"]
    factor = measured / predicted
    found = {"slice": plan["slice"], "measured_seconds": measured, "predicted_seconds": predicted, "factor": factor}
    kept = json.dumps(found, indent=1).encode()
    if is_bucket(run_dir):
        Bucket(run_dir).write_all({CALIBRATION_FILE: kept})
    else:
        write_whole(run / CALIBRATION_FILE, kept)
    hidden = plan["step"]["hidden"]
    if measured < hidden:
        where = "faster than the compute alone was predicted: the compiler's cycles were too many"
    elif measured <= predicted:
        where = "between compute alone and compute with all waiting: more of the collectives is hidden than was assumed"
    else:
        where = "slower than compute and waiting: slower links than assumed, stalls of kernels or memory, or a host that is late"
    return factor, [
        f"{run_dir}: a step took {measured:.3f} s, predicted {predicted:.3f} ({hidden:.3f} without waiting): factor {factor:.3f}",
        f"  {where}",
    ]


def read_plan(run: Path) -> dict | None:
    file = run / PLAN_FILE
    return json.loads(file.read_bytes()) if file.is_file() else None


def measured_step(metrics_file: Path) -> float | None:
    """The median seconds of a step between lines of the log: evaluations and checkpoints are outliers of it."""
    lines = read_metrics(metrics_file, "train")[-_LAST_LINES:] if metrics_file.is_file() else []
    gaps = [
        (b["time"] - a["time"]) / (b["step"] - a["step"])
        for a, b in zip(lines, lines[1:], strict=False)
        if b["time"] > a["time"]
    ]
    return statistics.median(gaps) if len(gaps) >= _FEWEST_STEPS else None


def beside(run: Path, config: RunConfig, device_kind: str, devices: int, memory: int | None) -> str | None:
    """One line: step time, MFU and peak memory (bytes a device) as measured, each with what the run's plan said of it.
    None while too little is measured, or where there is neither a plan nor a known chip to compare with."""
    seconds, plan = measured_step(run / "metrics.jsonl"), read_plan(run) or {}
    chip = next((c for c in CHIPS.values() if c.device_kind == device_kind), None)
    if seconds is None or not (chip or "step" in plan):
        return None

    def said(text: str) -> str:
        return f" ({text} planned)" if "step" in plan else ""

    parts = [f"{seconds:.3f} s a step" + (said(f"{plan['step']['seconds']:.3f}") if plan else "")]
    if chip:
        flops = model_flops(config.model, config.data.sequence_length) * config.train.batch_size / devices
        parts.append(f"MFU {flops / seconds / chip.peak_flops:.1%}" + (said(f"{plan['mfu']:.1%}") if plan else ""))
    if memory:
        stated = said(f"{plan['memory']['peak'] / GiB:.1f}") if plan else ""
        parts.append(f"peak memory {memory / GiB:.1f} GiB{stated}")
    return ", ".join(parts)
