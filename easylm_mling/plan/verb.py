"""`easylm-mling plan`: one config, several side by side, or a search for the best."""

import dataclasses
import importlib.util
import json
from pathlib import Path

from rich.console import Console

from easylm_mling.atomic import write_whole
from easylm_mling.config import ConfigError, RunConfig, to_yaml
from easylm_mling.plan.calibrate import PLAN_FILE, calibrate
from easylm_mling.plan.measure import Measuring
from easylm_mling.plan.predict import predict
from easylm_mling.plan.report import comparison, does_not_fit_text, print_plan, ranking, settings_text
from easylm_mling.plan.search import search, step_seconds, with_train
from easylm_mling.plan.slices import SLICES, GiB, find_slice

REMEDIES = 3


@dataclasses.dataclass(frozen=True)
class Wishes:
    """The verb's options; see `plan --help`."""

    price: float | None = None
    as_json: bool = False
    keep: bool = False
    search: str | None = None
    calibrate: str | None = None


def plan(configs: dict[str, RunConfig], wishes: Wishes, console: Console) -> int:
    """Plan each of `configs` (name -> config), several side by side. Returns 0 when all fit, otherwise 1."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("plan needs the TPU compiler, libtpu; install it with pip install 'easylm-mling[tpu]'")
    # Nothing but the result goes to standard output when that is JSON.
    console = Console(stderr=True) if wishes.as_json else console
    for config in configs.values():
        find_slice(config.mesh.slice or "")
    factor = 1.0
    if wishes.calibrate:
        factor, news = calibrate(wishes.calibrate, lambda config: _predicted(config, 1.0, None, console))
        for line in news:
            console.print(line, highlight=False, soft_wrap=True)
    if wishes.search:
        (config,) = configs.values()
        return _search(config, wishes, factor, console)
    found = {name: _predicted(config, factor, wishes.price, console) for name, config in configs.items()}
    if wishes.as_json:
        print(json.dumps(found if len(found) > 1 else next(iter(found.values())), indent=1))
    for name, config in configs.items():
        if wishes.as_json or len(found) > 1:
            continue
        if "does_not_fit" in found[name]:
            _tell_misfit(config, found[name], console)
        else:
            print_plan(config, found[name], console)
    if len(found) > 1 and not wishes.as_json:
        console.print(comparison(configs, found))
    if wishes.keep:
        for name, config in configs.items():
            _keep(config, found[name])
    return int(any("does_not_fit" in f for f in found.values()))


def _predicted(config: RunConfig, factor: float, price: float | None, console: Console) -> dict:
    measured = _measured(config, console)
    return measured if "does_not_fit" in measured else predict(config, measured, factor, price)


def _measured(config: RunConfig, console: Console) -> dict:
    measuring = Measuring(config)
    try:
        with console.status(f"compiling for {config.mesh.slice}: {settings_text(config)}"):
            measured = measuring.result(wait=None)
    finally:
        measuring.close()
    assert measured is not None
    if "error" in measured:
        raise ConfigError(measured["error"])
    return measured


def _keep(config: RunConfig, found: dict):
    """Beside the run to come, where `train` shows it next to what it measures."""
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    write_whole(Path(config.run_dir) / PLAN_FILE, json.dumps(found, indent=1).encode())


def _tell_misfit(config: RunConfig, found: dict, console: Console):
    console.print(does_not_fit_text(config, found["does_not_fit"]), highlight=False, soft_wrap=True)
    for other in remedies(config)[:REMEDIES]:
        measured = _measured(other, console)
        if "does_not_fit" not in measured:
            console.print(
                f" what would fit: {other.mesh.slice} with {settings_text(other)}, {measured['memory']['peak'] / GiB:.1f} GiB a chip, "
                f"{step_seconds(measured):.2f} s a step",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            return
        console.print(f" {other.mesh.slice} with {settings_text(other)} does not fit either", highlight=False)
    console.print(" nothing tried fits; a larger slice, or --search, may find what does")


def remedies(config: RunConfig) -> list[RunConfig]:
    """What needs less memory, from the smallest change to the largest."""
    where = find_slice(config.mesh.slice or "")
    least = with_train(config, remat="full")
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


def _search(config: RunConfig, wishes: Wishes, factor: float, console: Console) -> int:
    folder = Path(wishes.search or "")
    tried = search(config, str(folder), console)
    fits = [(c, predict(c, m, factor, wishes.price)) for c, m in tried if "times" in m]
    fits.sort(key=lambda item: item[1]["step"]["seconds"])
    if wishes.as_json:
        print(
            json.dumps(
                [{"mesh": dataclasses.asdict(c.mesh), "train": dataclasses.asdict(c.train), **p} for c, p in fits],
                indent=1,
            )
        )
    else:
        console.print(ranking(fits))
    misfits, failed = (sum(word in m for _, m in tried) for word in ("does_not_fit", "error"))
    console.print(f"{len(tried)} tried; {misfits} do not fit, {failed} failed", highlight=False)
    if not fits:
        return 1
    best, predicted = fits[0]
    target = folder / "best.yaml"
    write_whole(target, to_yaml(best).encode())
    if wishes.keep:
        _keep(best, predicted)
    console.print(f"the best is written to {target}: easylm-mling train {target}", highlight=False, soft_wrap=True)
    return 0
