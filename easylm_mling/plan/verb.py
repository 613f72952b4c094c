"""`easylm-mling plan`."""

import json

from rich.console import Console

from easylm_mling.config import ConfigError, RunConfig
from easylm_mling.metrics import make_console
from easylm_mling.plan.measure import Measuring
from easylm_mling.plan.predict import predict
from easylm_mling.plan.report import print_plan
from easylm_mling.plan.slices import find_slice


def plan(config: RunConfig, price: float | None, as_json: bool, console: Console | None = None) -> int:
    console = console or make_console()
    find_slice(config.mesh.slice or "")
    measured = measured_once(config, console)
    found = predict(config, measured, price=price)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_plan(config, found, console)
    return 0


def measured_once(config: RunConfig, console: Console) -> dict:
    measuring = Measuring(config)
    try:
        with console.status(f"compiling the step for {config.mesh.slice} ..."):
            result = measuring.result(wait=None)
    finally:
        measuring.close()
    assert result is not None
    if "error" in result:
        raise ConfigError(result["error"])
    return result
