"""Compare a run's measured step time, MFU and memory with what its plan predicted."""

import json
import statistics
from pathlib import Path

from easylm_mling.config import RunConfig
from easylm_mling.hardware import CHIPS, GiB
from easylm_mling.model.flops import model_flops
from easylm_mling.monitoring.metrics import read_metrics

PLAN_FILE, CALIBRATION_FILE = "plan.json", "calibration.json"


_FEWEST_STEPS, _LAST_LINES = 5, 200


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


def compare_with_plan(run: Path, config: RunConfig, device_kind: str, devices: int, memory: int | None) -> str | None:
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
