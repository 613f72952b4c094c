"""The tasks of a suite, loaded and checked before anything is computed: names, data sets, splits and shots."""

import difflib
import logging
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import orjson
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from easylm_mling.errors import ConfigError, check, one_line
from easylm_mling.evaluation.scoring.suites import Suite, SuiteRow

_FEWSHOT_SEED = 1234  # the harness's own
# A hint for each task that reads local files.
logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.getMessage())


@dataclass(frozen=True)
class LoadedRow:
    """A row of the table, its tasks, and the group that they form, if any."""

    row: SuiteRow
    tasks: dict[str, Task]
    groups: dict[str, Group]

    @property
    def shots(self) -> str:
        """The shots of its tasks, as text."""
        return "/".join(map(str, sorted({int(t.config.num_fewshot or 0) for t in self.tasks.values()})))

    @property
    def splits(self) -> str:
        """Where its items and its shots are from, as text: `test`, or `test (shots: train)`."""
        scored = "/".join(sorted({str(_scored_split(t)) for t in self.tasks.values()}))
        shots = "/".join(sorted({str(_shot_split(t)) for t in self.tasks.values() if t.config.num_fewshot}))
        return f"{scored} (shots: {shots})" if shots else scored

    def seed(self):
        """Let its tasks draw their shots from the beginning."""
        for task in self.tasks.values():
            task.set_fewshot_seed(_FEWSHOT_SEED)


def load_rows(suite: Suite) -> list[LoadedRow]:
    """Load the tasks of all rows, with the data of `suite.data` if it is given. Raises one ConfigError that names all that is wrong."""
    manager = make_manager(suite)
    if suite.data:
        from easylm_mling.evaluation.scoring.kept_data import KeptFactory

        manager._factory = KeptFactory(suite.data)
    rows, problems = [], []
    for row in suite.rows:
        try:
            loaded = manager.load([row.task])
        except ConfigError:
            raise
        except Exception as error:  # datasets and the tasks' own code raise whatever they like
            problems.append(f"{row.task} ({one_line(error)})")
            continue
        made = LoadedRow(row, dict(loaded["tasks"]), dict(loaded.get("groups", {})))
        problems += _set_shots(made)
        rows.append(made)
    check(
        not problems,
        f"suite {suite.name}: {len(problems)} of its tasks cannot be had here: {'; '.join(problems)}; leave them out, or mend "
        "what is said of them: a data set that is not on this machine needs the network once",
    )
    names = [name for row in rows for name in row.tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, f"suite {suite.name}: {', '.join(twice)} is in two of its rows; leave one out")
    return rows


def task_digests(rows: list[LoadedRow]) -> dict[str, str]:
    """Return for each task a digest of its harness, version, items and shots, as they are written into prompts.

    Scores of one task can be compared if it is the same, whatever file or machine the task came from.
    """
    return {name: _digest(task) for row in rows for name, task in row.tasks.items()}


def _digest(task: Any) -> str:
    digest, c = blake2b(digest_size=8), task.config
    settings = [version("lm_eval"), str(task.VERSION), c.description, c.target_delimiter, c.fewshot_delimiter,
                c.num_fewshot, c.gen_prefix, c.generation_kwargs]  # fmt: skip
    digest.update(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS, default=lambda _: "code"))
    for docs in (task.eval_docs, task.fewshot_docs() or ()) if c.num_fewshot else (task.eval_docs,):
        for doc in docs:
            choices = task.doc_to_choice(doc) if c.doc_to_choice is not None else None
            parts = [task.doc_to_text(doc), choices, task.doc_to_target(doc)]
            digest.update(orjson.dumps(parts, default=str, option=orjson.OPT_NON_STR_KEYS))
    return digest.hexdigest()


def make_manager(suite: Suite) -> TaskManager:
    """Return the index of tasks for a suite. Raises ConfigError for names that are not in it."""
    folders: Any = [str(folder) for folder in suite.include]
    wanted = {row.task for row in suite.rows}
    manager = TaskManager(include_path=folders, include_defaults=False)
    if wanted - {*manager.all_tasks}:
        # The index of the harness's own tasks takes seconds.
        manager = TaskManager(include_path=folders)
    missing = sorted(wanted - {*manager.all_tasks})
    if missing:
        shown = []
        for name in missing:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            shown.append(name + (f" (did you mean {close[0]}?)" if close else ""))
        raise ConfigError(
            f"suite {suite.name}: there is no task {', '.join(shown)} in lm-evaluation-harness or in "
            f"{', '.join(folders) or 'an --include-path'}"
        )
    return manager


def _set_shots(row: LoadedRow) -> list[str]:
    """Set the shots of a row's tasks, and return what is wrong with them or with their splits."""
    problems, shots = [], row.row.shots
    for name, task in row.tasks.items():
        own = task.config.num_fewshot
        if own == 0 and shots:
            problems.append(f"{name} (it fixes 0 shots, so it cannot have {shots})")
            continue
        task.set_config("num_fewshot", (own or 0) if shots is None else shots)
        task.set_fewshot_seed(_FEWSHOT_SEED)
        if _scored_split(task) is None:
            problems.append(f"{name} (it has no test and no validation split)")
            continue
        wanted, there = int(task.config.num_fewshot or 0), 0
        if wanted and _shot_split(task) is None:
            problems.append(f"{name} (it has no split to take {wanted} shots from)")
        elif wanted:
            there = len(list(task.fewshot_docs() or ()))
            if there < wanted:
                problems.append(f"{name} ({wanted} shots are wanted, and its split {_shot_split(task)} has {there})")
    return problems


def wanted_splits(task: Task) -> list[str]:
    """Return the splits that a task takes its items and its shots from, of those that its data set has."""
    return sorted({s for s in (_scored_split(task), _shot_split(task)) if s} & {*task.dataset})  # pyright: ignore[reportArgumentType]


def _scored_split(task: Task) -> str | None:
    return task.config.test_split or task.config.validation_split


def _shot_split(task: Task) -> str | None:
    own = getattr(task, "fewshot_cfg", None)
    if own is not None and own.split is None and own.samples is not None:
        return "own"
    c = task.config
    return getattr(own, "split", None) or c.training_split or c.validation_split or c.test_split
