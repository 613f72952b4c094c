"""`easylm-mling plan`: plan one config, compare several, or search for the fastest."""

import dataclasses
import json
import signal
from pathlib import Path

from rich.console import Console

from easylm_mling.config import RunConfig, to_tree, to_yaml
from easylm_mling.errors import ConfigError
from easylm_mling.hardware import GiB
from easylm_mling.monitoring.console import say
from easylm_mling.monitoring.plan_comparison import PLAN_FILE
from easylm_mling.plan.calibrate import calibrate
from easylm_mling.plan.measurements import MeasurementCache, fits, step_seconds
from easylm_mling.plan.predict import predict
from easylm_mling.plan.remat import choose_remat, with_remat
from easylm_mling.plan.search import search, with_train
from easylm_mling.plan.slices import SLICES, find_slice
from easylm_mling.plan.text import comparison, does_not_fit_text, print_plan, ranking, settings_text
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.object_store import Bucket, is_bucket

REMEDIES = 3


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The verb's options; see `plan --help`."""

    price: float | None = None
    as_json: bool = False
    keep: bool = False
    search: str | None = None
    calibrate: str | None = None


def plan(configs: dict[str, RunConfig], wishes: PlanOptions, console: Console) -> int:
    """Plan each of `configs` (name -> config), several side by side. Returns 0 when all fit, otherwise 1."""
    book = MeasurementCache()
    # Ended from outside, it must not leave compilers behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Nothing but the result goes to standard output when that is JSON.
    console = Console(stderr=True) if wishes.as_json else console
    for config in configs.values():
        find_slice(config.mesh.slice or "")
    factor = 1.0
    if wishes.calibrate:
        factor, news = calibrate(wishes.calibrate, lambda config: _predicted(config, 1.0, None, book, console))
        for line in news:
            say(console, line)
    elif not configs:
        raise ConfigError("plan: name the run's configs, as for train")
    if wishes.search:
        return _search(configs, wishes, factor, console)
    configs = {name: choose_remat(config, book, console) for name, config in configs.items()}
    found = {name: _predicted(config, factor, wishes.price, book, console) for name, config in configs.items()}
    if wishes.as_json and found:
        print(json.dumps(found if len(found) > 1 else next(iter(found.values())), indent=1))
    elif len(found) > 1:
        console.print(comparison(configs, found))
    for name, config in configs.items():
        if "does_not_fit" in found[name]:
            if len(found) == 1 and not wishes.as_json:
                _tell_misfit(config, found[name], book, console)
            continue
        if len(found) == 1 and not wishes.as_json:
            print_plan(config, found[name], console)
        if wishes.keep:
            _keep(config, found[name])
    return int(any("does_not_fit" in f for f in found.values()))


def _predicted(config: RunConfig, factor: float, price: float | None, book: MeasurementCache, console: Console) -> dict:
    measured = _measured(config, book, console)
    return measured if "does_not_fit" in measured else predict(config, measured, factor, price)


def _measured(config: RunConfig, book: MeasurementCache, console: Console) -> dict:
    book.measure([config], console, tell=False)
    measured = book.get(config)
    if "error" in measured:
        raise ConfigError(measured["error"])
    return measured


def _keep(config: RunConfig, found: dict):
    """Beside the run to come, where `train` shows it next to what it measures."""
    content = json.dumps(found, indent=1).encode()
    if is_bucket(config.run_dir):
        Bucket(config.run_dir).write_all({PLAN_FILE: content})
        return
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(config.run_dir) / PLAN_FILE, content)


def _tell_misfit(config: RunConfig, found: dict, book: MeasurementCache, console: Console):
    say(console, does_not_fit_text(config, found["does_not_fit"]))
    for other in remedies(config)[:REMEDIES]:
        measured = _measured(other, book, console)
        if "does_not_fit" not in measured:
            amount = f"{measured['memory']['peak'] / GiB:.1f} GiB a chip, {step_seconds(measured):.2f} s a step"
            say(console, f" what would fit: {other.mesh.slice} with {settings_text(other)}, {amount}")
            return
        say(console, f" {other.mesh.slice} with {settings_text(other)} does not fit either")
    say(console, " nothing tried fits; a larger slice, or --search, may find what does")


def remedies(config: RunConfig) -> list[RunConfig]:
    """What needs less memory, from the smallest change to the largest."""
    where = find_slice(config.mesh.slice or "")
    least = with_remat(config, "full")
    shards = where.chips // max(1, config.mesh.tensor)
    rows = config.train.batch_size
    found = [least]
    if rows % shards == 0:
        found.append(with_train(least, accumulation_steps=rows // shards))
    for name, larger in SLICES.items():
        if larger.chip == where.chip and larger.chips > where.chips and rows % larger.chips == 0:
            mesh = dataclasses.replace(config.mesh, slice=name, data=1, fsdp=larger.chips, tensor=1)
            found.append(dataclasses.replace(with_train(least, accumulation_steps=rows // larger.chips), mesh=mesh))
    return [c for i, c in enumerate(found) if c != config and c not in found[:i]]


def _search(configs: dict[str, RunConfig], wishes: PlanOptions, factor: float, console: Console) -> int:
    if len(configs) != 1:
        raise ConfigError("plan --search works on one run's configs; leave --compare out")
    (config,), folder = configs.values(), Path(wishes.search or "")
    tried = search(config, str(folder), console)
    found = [(c, predict(c, m, factor, wishes.price)) for c, m in tried if fits(c, m)]
    found.sort(key=lambda item: item[1]["step"]["seconds"])
    if wishes.as_json:
        print(json.dumps([{"mesh": to_tree(c.mesh), "train": to_tree(c.train), **p} for c, p in found], indent=1))
    else:
        console.print(ranking(found))
    failed = [m["error"] for _, m in tried if "error" in m]
    large, share = len(tried) - len(failed) - len(found), config.train.remat_memory
    say(console, f"{len(tried)} tried, {large} do not fit {share:.0%} of a chip's memory")
    for error in sorted(set(failed)):
        say(console, f"{failed.count(error)} failed: {error}")
    if not found:
        return 1
    best, predicted = found[0]
    target = folder / "best.yaml"
    write_atomically(target, to_yaml(best).encode())
    if wishes.keep:
        _keep(best, predicted)
    say(console, f"the best is written to {target}: easylm-mling train {target}")
    return 0
