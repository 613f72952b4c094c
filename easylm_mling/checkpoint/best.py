"""The steps that an evaluation chose as the best of a run, in RUN/evaluations/best-SUITE.json."""

import json
from pathlib import Path

import orjson

from easylm_mling.checkpoint.layout import committed_steps
from easylm_mling.errors import ConfigError, check_format
from easylm_mling.storage.atomic import write_atomically

FORMAT = 1
_FOLDER = "evaluations"


def best_steps(run: str | Path) -> dict[str, int]:
    """Return suite -> its best step, of a run on a disk. What cannot be read is left out: a save must not end for it."""
    steps = {}
    for file in sorted((Path(run) / _FOLDER).glob("best-*.json")):
        try:
            tree = orjson.loads(file.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(tree, dict) and tree.get("format") == FORMAT and isinstance(tree.get("best"), int):
            steps[file.stem.removeprefix("best-")] = tree["best"]
    return steps


def choices_of(run: str | Path, step: int) -> dict[str, dict]:
    """Return suite -> what was noted of the choice, of the suites that chose `step` as the best."""
    folder = Path(run) / _FOLDER
    return {
        suite: orjson.loads((folder / f"best-{suite}.json").read_bytes())
        for suite, best in best_steps(run).items()
        if best == step
    }


def best_step(run: str | Path, suite: str) -> int:
    """Return the best step by `suite`. Raises ConfigError if none was chosen, or if its checkpoint is gone."""
    file = Path(run) / _FOLDER / f"best-{suite}.json"
    known = best_steps(run)
    if suite not in known:
        if file.is_file():
            try:
                number = orjson.loads(file.read_bytes())["format"]
            except (ValueError, LookupError, TypeError):
                raise ConfigError(
                    f"{file}: cannot be read; run `easylm-mling eval {run} --suite {suite} --all`"
                ) from None
            check_format(file, "choice", number, FORMAT, "evaluate again")
        raise ConfigError(
            f"{run}: no best checkpoint was chosen by {suite} (by {', '.join(known) or 'nothing yet'}); run "
            f"`easylm-mling eval {run} --suite {suite} --all`"
        )
    if known[suite] not in committed_steps(run):
        raise ConfigError(
            f"{run}: the best checkpoint by {suite} was step {known[suite]}, which is gone; set checkpoint.keep_best=true, and "
            f"run `easylm-mling eval {run} --suite {suite} --all` to choose among those left"
        )
    return known[suite]


def write_best(run: str | Path, suite: str, step: int, about: dict) -> Path:
    """Note the best step by `suite`, and `about` it what else is to be known; return the file."""
    file = Path(run) / _FOLDER / f"best-{suite}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"format": FORMAT, "suite": suite, "best": step, **about}, indent=1).encode())
    return file
