"""The data sets of a suite kept in a folder: fetched once where there is a network, read and checked where there is none.

DIR/manifest.json has for each task its splits, with the digest of DIR/TASK/SPLIT.jsonl and the types of its fields.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import orjson
from datasets import Dataset, DatasetDict, Features
from lm_eval.tasks._factory import TaskFactory

from easylm_mling.errors import ConfigError, check, check_format, one_line
from easylm_mling.evaluation.scoring.suites import Suite
from easylm_mling.evaluation.scoring.tasks import make_manager, wanted_splits
from easylm_mling.storage.atomic import atomic_file, write_atomically

FORMAT = 1
MANIFEST = "manifest.json"


def fetch_suite(suite: Suite, folder: Path, tell: Callable[[str], None]) -> list[str]:
    """Write the wanted splits of every task of a suite into `folder`, and return what cannot be had, each with why.

    What is there and whole is kept. `tell` is given a line for each task. Raises ConfigError for a task that is not known.
    """
    manager = make_manager(suite)
    factory = FetchingFactory(folder, tell)
    manager._factory = factory
    for row in suite.rows:
        manager.load([row.task])
    return factory.problems


class FetchingFactory(TaskFactory):
    """Makes tasks, and keeps their data in `folder`. A task that fails becomes a problem, and the others go on."""

    def __init__(self, folder: Path, tell: Callable[[str], None]):
        super().__init__()
        self.problems: list[str] = []
        self._folder, self._tell = folder, tell
        self._tasks = read_manifest(folder) if (folder / MANIFEST).is_file() else {}

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        name = (overrides or {}).get("task", entry.name)
        try:
            if name in self._tasks:
                self._tell(f"{name}: is there")
                return KeptFactory(self._folder)._build_task(entry, overrides)
            task = super()._build_task(entry, overrides)
            self._tasks[name] = self._write(name, task)
        except Exception as error:  # noqa: BLE001 - data sets and the tasks' own code raise whatever they like
            self.problems.append(f"{name} ({one_line(error)[:200]})")
            self._tell(f"{name}: cannot be had")
            return SimpleNamespace(task_name=name)
        tree = {"format": FORMAT, "lm_eval": version("lm_eval"), "tasks": self._tasks}
        write_atomically(self._folder / MANIFEST, orjson.dumps(tree, option=orjson.OPT_INDENT_2))
        sizes = ", ".join(f"{s['items']:,} of {split}" for split, s in self._tasks[name]["splits"].items())
        self._tell(f"{name}: {sizes}")
        return task

    def _write(self, name: str, task: Any) -> dict:
        splits, c = {}, task.config
        for split in wanted_splits(task):
            rows, file = task.dataset[split], Path(quote(name, safe="")) / f"{quote(split, safe='')}.jsonl"
            (self._folder / file).parent.mkdir(parents=True, exist_ok=True)
            digest, count = blake2b(digest_size=16), 0
            with atomic_file(self._folder / file) as out:
                for row in rows:
                    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                    digest.update(line)
                    out.write(line)
                    count += 1
            features = rows.features.to_dict() if getattr(rows, "features", None) else None
            splits[split] = {"file": str(file), "items": count, "digest": digest.hexdigest(), "features": features}
        about = {"data_set": c.dataset_path, "name": c.dataset_name, "version": str(task.VERSION)}
        return {**about, "splits": splits}


class KeptFactory(TaskFactory):
    """Makes tasks that read their data from `folder`, and from nowhere else."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder, self._tasks = folder, read_manifest(folder)

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        name = (overrides or {}).get("task", entry.name)
        check(
            name in self._tasks,
            f"{self._folder}: has no data of {name}; run `easylm-mling fetch-eval SUITE {self._folder}` where there is a network",
        )
        read = partial(_read, self._folder, self._tasks[name]["splits"])
        return super()._build_task(entry, {**(overrides or {}), "custom_dataset": read, "dataset_kwargs": {}})


def read_manifest(folder: Path) -> dict[str, dict]:
    """Return the tasks that are kept in `folder`. Raises ConfigError if it is no folder of fetch-eval."""
    file = folder / MANIFEST
    try:
        tree = orjson.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({one_line(error)}); name a folder that fetch-eval made") from None
    check(isinstance(tree, dict) and "tasks" in tree, f"{file}: is no manifest of fetch-eval")
    check_format(file, "manifest", tree.get("format"), FORMAT, "fetch again into another folder")
    return tree["tasks"]


def _read(folder: Path, splits: dict[str, dict], /, **_: Any) -> DatasetDict:
    """Return the splits of a task. Raises ConfigError for a file that is not the one that was fetched."""
    made = {}
    for split, kept in splits.items():
        rows = list(_rows(folder / kept["file"], kept["digest"]))
        features = Features.from_dict(kept["features"]) if kept["features"] else None
        made[split] = Dataset.from_list(rows, features=features)
    return DatasetDict(made)


def _rows(file: Path, digest: str) -> Iterator[dict]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({one_line(error)}); fetch again") from None
    check(
        blake2b(content, digest_size=16).hexdigest() == digest,
        f"{file}: is not what fetch-eval wrote, by its digest; restore it, or fetch again into another folder",
    )
    return map(json.loads, content.splitlines())
