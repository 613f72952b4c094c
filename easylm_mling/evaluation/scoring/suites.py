"""Suites: named lists of tasks with their shots and measures, as YAML in configs/eval/."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import yaml

from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.errors import ConfigError, check

SUITES = Path("configs") / "eval"
_KEYS = {"row", "task", "shots", "measure"}


@dataclass(frozen=True)
class SuiteRow:
    """One row of a suite's table."""

    name: str
    task: str  # a task or group of the harness, or of an included folder
    shots: int | None = None  # None: the task's own number
    measure: str | None = None  # such as acc_norm; None: every measure of the task


@dataclass(frozen=True)
class Suite:
    """Rows in the order of the table, and the folders in which their tasks are looked up first."""

    name: str
    rows: tuple[SuiteRow, ...]
    include: tuple[Path, ...] = ()
    data: Path | None = None  # a folder of fetch-eval, for its tasks' data


def harness_is_there() -> bool:
    """Return True if lm-evaluation-harness, which has the tasks, is installed."""
    return find_spec("lm_eval") is not None


def load_suite(name: str) -> Suite:
    """Read a suite by its name in configs/eval/, of the current folder or of this checkout, or by its file.

    Raises ConfigError for what is missing, unknown or wrong in it.
    """
    folders = (SUITES, Path(__file__).parents[3] / SUITES)
    places = [Path(name)] if name.endswith((".yaml", ".yml")) else [folder / f"{name}.yaml" for folder in folders]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = sorted({f.stem for folder in folders for f in folder.glob("*.yaml")})
        raise ConfigError(
            f"--suite {name}: no such suite; name a YAML file or one of {', '.join(known) or 'none here'}"
        )
    try:
        tree = read_yaml(file.read_bytes())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is no YAML ({' '.join(str(error).split())[:150]})") from None
    check(
        isinstance(tree, dict) and isinstance(tree.get("rows"), list) and not tree.keys() - {"rows", "include"},
        f"{file}: a suite has `rows`, and may have `include`, a list of folders with tasks",
    )
    rows = tuple(_row(file, entry) for entry in tree["rows"])
    check(bool(rows), f"{file}: has no rows")
    include = tuple((file.parent / str(folder)).resolve() for folder in tree.get("include") or ())
    return _checked(Suite(file.stem, rows, include))


def tasks_suite(tasks: str, shots: int | None) -> Suite:
    """Return the suite of tasks named on the command line: `arc_easy,haerae`, each with `shots`."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    check(bool(names), "--tasks: names no task; write --tasks NAME,NAME")
    return _checked(Suite("tasks", tuple(SuiteRow(name, name, shots) for name in names)))


def with_include(suite: Suite, folders: list[str]) -> Suite:
    """Return the suite with further folders of tasks. Raises ConfigError for one that is none."""
    for folder in folders:
        check(Path(folder).is_dir(), f"--include-path {folder}: is no folder; name one that holds task YAML files")
    return replace(suite, include=(*suite.include, *(Path(f).resolve() for f in folders)))


def with_data(suite: Suite, folder: str | None) -> Suite:
    """Return the suite with its data in `folder`, if one is given. Raises ConfigError for one that fetch-eval did not make."""
    if not folder:
        return suite
    check(
        (Path(folder) / "manifest.json").is_file(),
        f"{folder}: has no manifest.json; name a folder that fetch-eval made",
    )
    return replace(suite, data=Path(folder))


def _row(file: Path, entry: object) -> SuiteRow:
    right = isinstance(entry, dict) and {"task"} <= entry.keys() <= _KEYS
    check(right, f"{file}: a row is `row`, `task`, `shots` and `measure`, and this is {entry!r}")
    assert isinstance(entry, dict)
    shots, measure = entry.get("shots"), entry.get("measure")
    check(
        shots is None or (isinstance(shots, int) and shots >= 0),
        f"{file}: shots={shots!r} of {entry['task']} must be zero or more",
    )
    return SuiteRow(str(entry.get("row", entry["task"])), str(entry["task"]), shots, measure and str(measure))


def _checked(suite: Suite) -> Suite:
    names = [row.task for row in suite.rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, f"suite {suite.name}: {', '.join(twice)} stands in it twice; leave one out")
    return suite
