"""`easylm-mling plan`: plan one config, compare several, or search for the fastest."""

import dataclasses
import json
import signal
from pathlib import Path

from rich.console import Console

from easylm_mling.config import RunConfig, to_tree, to_yaml
from easylm_mling.errors import ConfigError, check
from easylm_mling.hardware import GiB
from easylm_mling.monitoring.console import say
from easylm_mling.monitoring.plan_comparison import PLAN_FILE, PLAN_FORMAT
from easylm_mling.plan.calibrate import calibrate
from easylm_mling.plan.measurements import MeasurementCache, fits, step_seconds
from easylm_mling.plan.predict import predict
from easylm_mling.plan.remat import choose_remat, with_remat
from easylm_mling.plan.search import search, with_train
from easylm_mling.plan.slices import SLICES, slice_of
from easylm_mling.plan.text import comparison, misfit_text, print_plan, ranking, settings_text
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.object_store import write_run_file

REMEDIES = 3


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The verb's options; see `plan --help`."""

    price: float | None = None
    as_json: bool = False
    keep: bool = False
    search: str | None = None
    calibrate: str | None = None


def plan(configs: dict[str, RunConfig], options: PlanOptions, console: Console) -> int:
    """Plan each of `configs`, by name. Returns 0 if all fit, otherwise 1.

    Raises ConfigError for an unknown slice, a config that cannot be cut for it, and a compiler that is missing or fails.
    """
    # As an interrupt, a termination also ends the compilers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # With --json, standard output holds nothing else.
    planner = _Planner(options.price, Console(stderr=True) if options.as_json else console)
    for config in configs.values():
        slice_of(config)
        check(
            config.budget_tokens > 0,
            "plan: days and cost need tokens, and train.budget_epochs does not say how many; take them from `data inspect`, and "
            "add train.budget_epochs=0 train.budget_tokens=N",
        )
    if options.calibrate:
        planner.calibrate(options.calibrate)
    elif not configs:
        raise ConfigError("plan: name the run's configs, as for train")
    if options.search:
        return _search(configs, options, planner)
    configs = {name: choose_remat(config, planner.cache, planner.console) for name, config in configs.items()}
    plans = {name: planner.plan(config) for name, config in configs.items()}
    if options.as_json and plans:
        print(json.dumps(plans if len(plans) > 1 else next(iter(plans.values())), indent=1))
    elif len(plans) > 1:
        planner.console.print(comparison(configs, plans))
    else:
        for name in plans:
            planner.print(configs[name], plans[name])
    fitting = [name for name in plans if "does_not_fit" not in plans[name]]
    if options.keep:
        for name in fitting:
            _keep(configs[name], plans[name])
    return int(len(fitting) < len(plans))


class _Planner:
    """What the plans of one command share: measurements, the console, the price, and the factor of an earlier run."""

    def __init__(self, price: float | None, console: Console):
        self.price, self.console = price, console
        self.cache, self.factor = MeasurementCache(), 1.0

    def plan(self, config: RunConfig) -> dict:
        """Return the plan of `config`, or its measurement where it does not fit."""
        measured = self.measure(config)
        return measured if "does_not_fit" in measured else predict(config, measured, self.factor, self.price)

    def measure(self, config: RunConfig) -> dict:
        self.cache.measure([config], self.console, print_lines=False)
        measured = self.cache.get(config)
        if "error" in measured:
            raise ConfigError(measured["error"])
        return measured

    def calibrate(self, run_dir: str):
        self.factor, lines = calibrate(run_dir, self.plan)
        for line in lines:
            say(self.console, line)

    def print(self, config: RunConfig, one: dict):
        """Print the plan `one`, or by how much `config` does not fit and what would."""
        if "does_not_fit" not in one:
            print_plan(config, one, self.console)
            return
        say(self.console, misfit_text(config, one["does_not_fit"]))
        for other in remedies(config)[:REMEDIES]:
            measured = self.measure(other)
            if "does_not_fit" not in measured:
                amount = f"{measured['memory']['peak'] / GiB:.1f} GiB a chip, {step_seconds(measured):.2f} s a step"
                say(self.console, f" what would fit: {other.mesh.slice} with {settings_text(other)}, {amount}")
                return
            say(self.console, f" {other.mesh.slice} with {settings_text(other)} does not fit either")
        say(self.console, " nothing tried fits; try a larger slice, or --search")


def _keep(config: RunConfig, one: dict):
    """Write the plan into the directory of the run to come, where `train` compares with it."""
    write_run_file(config.run_dir, PLAN_FILE, json.dumps({"format": PLAN_FORMAT, **one}, indent=1).encode())


def remedies(config: RunConfig) -> list[RunConfig]:
    """List configs that need less memory, from the smallest change to the largest."""
    target, rows = slice_of(config), config.train.batch_size
    full_remat = with_remat(config, "full")
    shards = target.devices // max(1, config.mesh.tensor * config.mesh.sequence)
    remedies = [full_remat]
    if rows % shards == 0:
        remedies.append(with_train(full_remat, accumulation_steps=rows // shards))
    for name, larger in SLICES.items():
        if (
            larger.chip == target.chip
            and larger.chips > target.chips
            and rows % (larger.devices // config.mesh.sequence) == 0
        ):
            fsdp = larger.devices // config.mesh.sequence
            mesh = dataclasses.replace(config.mesh, slice=name, data=1, fsdp=fsdp, tensor=1)
            accumulated = with_train(full_remat, accumulation_steps=rows // fsdp)
            remedies.append(dataclasses.replace(accumulated, mesh=mesh))
    return [c for i, c in enumerate(remedies) if c != config and c not in remedies[:i]]


def _search(configs: dict[str, RunConfig], options: PlanOptions, planner: _Planner) -> int:
    if len(configs) != 1:
        raise ConfigError("plan --search works on one run's configs; leave --compare out")
    (config,), folder, console = configs.values(), Path(options.search or ""), planner.console
    tried = search(config, folder, console)
    plans = [(c, predict(c, m, planner.factor, planner.price)) for c, m in tried if fits(c, m)]
    plans.sort(key=lambda item: item[1]["step"]["seconds"])
    if options.as_json:
        print(json.dumps([{"mesh": to_tree(c.mesh), "train": to_tree(c.train), **p} for c, p in plans], indent=1))
    else:
        console.print(ranking(plans))
    errors = [m["error"] for _, m in tried if "error" in m]
    misfits, share = len(tried) - len(errors) - len(plans), config.train.remat_memory
    say(console, f"{len(tried)} tried, {misfits} do not fit {share:.0%} of a chip's memory")
    for error in sorted(set(errors)):
        say(console, f"{errors.count(error)} failed: {error}")
    if not plans:
        return 1
    best, predicted = plans[0]
    target = folder / "best.yaml"
    write_atomically(target, to_yaml(best).encode())
    if options.keep:
        _keep(best, predicted)
    say(console, f"the best is written to {target}: easylm-mling train {target}")
    return 0
