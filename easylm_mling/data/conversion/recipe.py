"""The recipe of `data convert`: which sets of which tasks, whose fields are what, and what is left out."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from easylm_mling.config import from_tree
from easylm_mling.config.basics import setting
from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.data.conversion.tasks import Task, known_tasks
from easylm_mling.errors import ConfigError, check


@dataclass(frozen=True)
class SetConfig:
    """A supervised set: its files, its task, and the names of its fields."""

    task: str = setting(help="a task of phrasings.yaml")
    paths: tuple[str, ...] = setting(
        help="files or globs of its train split: jsonl (also packed), csv, tsv, parquet, arrow"
    )
    fields: dict[str, str] = setting(help="the task's field -> the key or column that holds it; a.b is b inside a")
    language: str = setting("ko", "language of the phrasings: ko, ja, zh or en")
    labels: dict[str, str] = setting(help="value of the label -> the answer that stands for it", factory=dict)
    options: str = setting("", "how a phrasing names the answers to choose from; by default all labels")
    leave_out: tuple[str, ...] = setting((), "values of the label whose rows are left out, such as -1")
    source_language: str = setting("", "translation: language of `text`")
    target_language: str = setting("", "translation: language of `translation`")
    split_field: str = setting("", "key or column that names a row's split: only rows of `train` are taken")


@dataclass(frozen=True)
class DecontaminationConfig:
    """Evaluation files whose text must not be trained on."""

    paths: tuple[str, ...] = setting(help="files or globs; every text in their rows counts")
    ngram: int = setting(
        13, "a row is left out if it has so many words in a row of them (letters, of Chinese and Japanese)"
    )
    shortest: int = setting(8, "a shorter text, down to so many words, counts as a whole; texts below do not")


@dataclass(frozen=True)
class Recipe:
    """Sets to convert, by name."""

    sets: dict[str, SetConfig] = setting(help="sets by name")
    seed: int = setting(0, "seed of the phrasings, and of the choice under most_rows_per_task")
    most_rows_per_task: int = setting(
        0, "rows of each task over all its sets, chosen by a hash of their content; 0: all"
    )
    decontaminate: DecontaminationConfig | None = setting(None, "what must not be trained on")


def load_recipe(file: str | Path) -> Recipe:
    """Read a recipe. Raises ConfigError that names the first wrong key."""
    check(Path(file).is_file(), f"{file}: no such recipe")
    try:
        tree = read_yaml(Path(file).read_bytes())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is no YAML ({' '.join(str(error).split())[:150]})") from None
    check(isinstance(tree, dict), f"{file}: expected `key: value` lines")
    recipe = from_tree(Recipe, tree)
    check(bool(recipe.sets), "sets is empty; name at least one set")
    check(recipe.most_rows_per_task >= 0, "most_rows_per_task must be zero (all) or more")
    if leave := recipe.decontaminate:
        check(
            1 <= leave.shortest <= leave.ngram <= 1000,
            f"decontaminate: ngram={leave.ngram} and shortest={leave.shortest} must be 1 <= shortest <= ngram <= 1000",
        )
    tasks = known_tasks()
    for name, one in recipe.sets.items():
        check(one.task in tasks, f"sets.{name}.task={one.task!r}: no such task; known are {', '.join(tasks)}")
        _check_set(f"sets.{name}", one, tasks[one.task])
    return recipe


def _check_set(key: str, one: SetConfig, task: Task):
    check(
        one.language in task.phrasings,
        f"{key}.language={one.language!r} must be one of {', '.join(task.phrasings)}",
    )
    wanted = {*task.fields, task.answer}
    unknown, missing = sorted(one.fields.keys() - wanted), sorted(wanted - one.fields.keys())
    check(
        not unknown, f"{key}.fields: {one.task} has no field {', '.join(unknown)}; it has {', '.join(sorted(wanted))}"
    )
    check(not missing, f"{key}.fields.{missing[0] if missing else ''} is missing: name the key or column that holds it")
    if task.answer == "label":
        check(
            bool(one.labels or one.options),
            f"{key}: give labels (value -> answer), or options, if the values themselves are the answers",
        )
    else:
        check(not (one.labels or one.leave_out), f"{key}.labels: {one.task} has no label; remove it")
    if one.task == "translation":
        for end in ("source_language", "target_language"):
            language = getattr(one, end)
            check(language in task.phrasings, f"{key}.{end}={language!r} must be one of {', '.join(task.phrasings)}")
