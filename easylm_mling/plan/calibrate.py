"""Calibrate later plans: what a run measured beside its plan, and the factor between the two.

RUN/plan.json is the plan that `plan --keep` left. RUN/calibration.json is for people to read; nothing reads it back.
"""

import json
from collections.abc import Callable

from easylm_mling.config import RunConfig, load_kept
from easylm_mling.errors import ConfigError, check
from easylm_mling.monitoring.plan_comparison import CALIBRATION_FILE, FEWEST_STEPS, measured_step, read_plan
from easylm_mling.storage.object_store import run_files, write_run_file


def calibrate(run_dir: str, make_plan: Callable[[RunConfig], dict]) -> tuple[float, list[str]]:
    """Return the measured over the predicted step time of the run in `run_dir`, and lines that explain it.

    Writes them to the run's calibration.json. `make_plan` plans a run that has no plan. Raises ConfigError where there is too
    little to compare.
    """
    run = run_files(run_dir)
    measured = measured_step(run / "metrics.jsonl")
    if measured is None:
        raise ConfigError(f"{run_dir}: fewer than {FEWEST_STEPS} steps in metrics.jsonl; let it train on first")
    plan = read_plan(run) or make_plan(load_kept(run / "config.yaml"))
    check(
        "step" in plan, f"{run_dir}: its plan does not fit the slice; plan it again with the mesh.slice that it ran on"
    )
    step = plan["step"]
    predicted, hidden = step["seconds"] / step["factor"], step["hidden"]
    factor = measured / predicted
    result = {"slice": plan["slice"], "measured_seconds": measured, "predicted_seconds": predicted, "factor": factor}
    write_run_file(run_dir, CALIBRATION_FILE, json.dumps(result, indent=1).encode())
    if measured < hidden:
        reason = "faster than the compute alone was predicted: the compiler's cycles were too many"
    elif measured <= predicted:
        reason = (
            "between compute alone and compute with all waiting: more of the collectives is hidden than was assumed"
        )
    else:
        reason = (
            "slower than compute and waiting: slower links than assumed, stalls of kernels or memory, or a slow host"
        )
    return factor, [
        f"{run_dir}: a step took {measured:.3f} s, predicted {predicted:.3f} ({hidden:.3f} without waiting): factor {factor:.3f}",
        f"  {reason}",
    ]
