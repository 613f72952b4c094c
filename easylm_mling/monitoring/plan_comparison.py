"""Compare a run's measured step time, MFU and memory with what its plan predicted."""

import json
import statistics
from pathlib import Path

from easylm_mling.config import RunConfig
from easylm_mling.errors import UnknownFormat, check_format
from easylm_mling.hardware import GiB, chip_of
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.monitoring.throughput import step_flops_per_chip

PLAN_FILE, CALIBRATION_FILE = "plan.json", "calibration.json"
PLAN_FORMAT = 1
FEWEST_STEPS, _LAST_LINES = 5, 200


def read_plan(run: Path) -> dict | None:
    """The plan that `plan --keep` left in the run's directory, if there is one. Raises UnknownFormat."""
    file = run / PLAN_FILE
    if not file.is_file():
        return None
    plan = json.loads(file.read_bytes())
    check_format(file, "plan", plan.get("format"), PLAN_FORMAT, "plan it again with plan --keep")
    return plan


def measured_step(metrics_file: Path) -> float | None:
    """The median seconds of a step between logged ones; None for fewer than FEWEST_STEPS.

    The median leaves out evaluations and checkpoints.
    """
    lines = read_metrics(metrics_file, "train")[-_LAST_LINES:] if metrics_file.is_file() else []
    gaps = [
        (b["time"] - a["time"]) / (b["step"] - a["step"])
        for a, b in zip(lines, lines[1:], strict=False)
        if b["time"] > a["time"]
    ]
    return statistics.median(gaps) if len(gaps) >= FEWEST_STEPS else None


def compare_with_plan(run: Path, config: RunConfig, device_kind: str, devices: int, memory: int | None) -> str | None:
    """One line with the measured step time, MFU and peak `memory` (bytes a device), each beside its planned value.

    None while too little is measured, or where there is neither a plan nor a known chip to compare with.
    """
    seconds, chip = measured_step(run / "metrics.jsonl"), chip_of(device_kind)
    try:
        plan = read_plan(run)
    except UnknownFormat as error:  # no reason to end a run
        return str(error)
    if seconds is None or not (chip or plan):
        return None
    parts = [f"{seconds:.3f} s a step" + (f" ({plan['step']['seconds']:.3f} planned)" if plan else "")]
    if chip:
        mfu = step_flops_per_chip(config, devices) / seconds / chip.peak_flops
        parts.append(f"MFU {mfu:.1%}" + (f" ({plan['mfu']:.1%} planned)" if plan else ""))
    if memory:
        planned = f" ({plan['memory']['peak'] / GiB:.1f} planned)" if plan else ""
        parts.append(f"peak memory {memory / GiB:.1f} GiB{planned}")
    return ", ".join(parts)
