"""The tasks and their phrasings, as data (phrasings.yaml), and a row as a question and its answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from easylm_mling.config.yaml12 import read_yaml

_BETWEEN = {"ko": ", ", "en": ", ", "ja": "、", "zh": "、"}


@dataclass(frozen=True)
class Task:
    """What a row of the task has, and how it is asked, by language."""

    fields: tuple[str, ...]
    answer: str
    phrasings: Mapping[str, tuple[str, ...]]


@cache
def known_tasks() -> dict[str, Task]:
    """Return the tasks of phrasings.yaml by name."""
    tree = _tree()
    languages = list(tree["names"])
    return {
        name: Task(tuple(task["fields"]), task["answer"], {tongue: tuple(task[tongue]) for tongue in languages})
        for name, task in tree.items()
        if name != "names"
    }


def ask(task: Task, language: str, number: int, values: Mapping[str, str]) -> str:
    """Return the question of a row in phrasing `number`, which is taken modulo their count.

    What stands in a value is text: braces in it are not filled in.
    """
    phrasings = task.phrasings[language]
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], phrasings[number % len(phrasings)])


def options_text(language: str, labels: Mapping[str, str]) -> str:
    """Return the answers to choose from, each once."""
    return _BETWEEN[language].join(dict.fromkeys(labels.values()))


def language_name(language: str, within: str) -> str:
    """Return the name of `language` in the language `within`."""
    return _tree()["names"][within][language]


@cache
def _tree() -> dict:
    return read_yaml(files("easylm_mling.data.conversion").joinpath("phrasings.yaml").read_bytes())
