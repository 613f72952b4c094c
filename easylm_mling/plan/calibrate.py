"""Calibrate later plans: what a run measured beside its plan, and the factor between the two.

RUN/plan.json is the plan that `plan --keep` left; RUN/calibration.json is what `plan --calibrate RUN` made of it.
"""

import json
from collections.abc import Callable

from easylm_mling.config import RunConfig, load
from easylm_mling.errors import ConfigError
from easylm_mling.monitoring.plan_comparison import CALIBRATION_FILE, FEWEST_STEPS, measured_step, read_plan
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.object_store import Bucket, is_bucket, run_files


def calibrate(run_dir: str, make_plan: Callable[[RunConfig], dict]) -> tuple[float, list[str]]:
    """(measured over predicted step time, what to tell) for the run in `run_dir`; kept in its calibration.json.

    A run without a plan is planned with `make_plan`. Raises ConfigError where there is too little to compare.
    """
    run = run_files(run_dir)
    measured = measured_step(run / "metrics.jsonl")
    if measured is None:
        raise ConfigError(f"{run_dir}: fewer than {FEWEST_STEPS} steps in metrics.jsonl; let it train on first")
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
        write_atomically(run / CALIBRATION_FILE, kept)
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
