"""`easylm-mling data convert`: rows of supervised sets, asked in many phrasings, as conversations, with a manifest.

The files are read twice where rows are chosen, and one row at a time. Which rows, and in which phrasing, is a function of
the seed and of a row's content: the same in every order of the files, and in every format of them.
"""

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import orjson

from easylm_mling import __version__
from easylm_mling.config import to_tree
from easylm_mling.data.conversion.overlap import Overlap, texts_in
from easylm_mling.data.conversion.recipe import DecontaminationConfig, Recipe, SetConfig, load_recipe
from easylm_mling.data.conversion.rows import find, rows_of, sha256_of, text_of, value_at
from easylm_mling.data.conversion.tasks import ask, known_tasks, language_name, options_text
from easylm_mling.errors import ConfigError, check
from easylm_mling.storage.atomic import atomic_file, write_atomically

MANIFEST_FORMAT = 1
# Of the rows that are read, what became of each that is not written.
LEFT_OUT = ("unreadable", "other_split", "empty", "label_left_out", "contaminated", "over_most_rows")
_EVALUATION = {"test", "dev", "val", "valid", "validation", "eval"}


class Example(NamedTuple):
    """A row of a set, ready to be asked: its fields by name, and `key`, a hash of seed, task and content."""

    name: str
    values: dict[str, str]
    answer: str
    key: int


def convert(recipe_file: str | Path, output: str | Path) -> dict:
    """Write `output`, jsonl of `messages`, and its manifest beside it; returns the manifest.

    Each appears whole or not at all. Raises ConfigError for a wrong recipe, a field or a label that is not in the files,
    files of an evaluation split, and a set of which no row is left.
    """
    recipe, output = load_recipe(recipe_file), Path(output)
    manifest_file = output.with_name(output.name.removesuffix(".jsonl") + ".manifest.json")
    check(output.name.endswith(".jsonl"), f"{output}: name a .jsonl file")
    for file in (output, manifest_file):
        check(not file.exists(), f"{file}: already exists; remove it, or name another output")
    check(output.parent.is_dir(), f"{output.parent}: no such folder; make it first")
    files = {name: _train_files(f"sets.{name}", one) for name, one in recipe.sets.items()}
    overlap, evaluation_files = _open_overlap(recipe.decontaminate)
    counts: dict[str, Counter] = {name: Counter() for name in recipe.sets}
    least = _thresholds(recipe, files, overlap)
    phrasings = {name: Counter() for name in recipe.sets}
    written: Counter[str] = Counter()
    with atomic_file(output) as file:
        for example in _examples(recipe, files, overlap, counts):
            one = recipe.sets[example.name]
            most = recipe.most_rows_per_task
            if most and (example.key > least[one.task] or written[one.task] == most):
                counts[example.name]["over_most_rows"] += 1
                continue
            task = known_tasks()[one.task]
            number = example.key % len(task.phrasings[one.language])
            turns = (("user", ask(task, one.language, number, example.values)), ("assistant", example.answer))
            row = {"messages": [{"role": role, "content": text} for role, text in turns], "set": example.name}
            file.write(orjson.dumps(row) + b"\n")
            written[one.task] += 1
            counts[example.name]["written"] += 1
            phrasings[example.name][number] += 1
        for name, of in counts.items():
            left = ", ".join(f"{of[why]} {why.replace('_', ' ')}" for why in LEFT_OUT if of[why])
            check(of["written"] > 0, f"sets.{name}: no row is left of {of['read']} ({left or 'its files are empty'})")
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": __version__,
        "recipe": to_tree(recipe),
        "output": {"file": output.name, "rows": written.total(), "sha256": sha256_of(output)},
        "tasks": dict(sorted(written.items())),
        "sets": {
            name: {
                **{key: of[key] for key in ("read", "written", *LEFT_OUT)},
                "phrasings": {str(n + 1): phrasings[name][n] for n in sorted(phrasings[name])},
                "files": _digests(files[name]),
            }
            for name, of in counts.items()
        },
        "decontamination": None
        if overlap is None
        else {
            "ngrams": len(overlap),
            "texts": overlap.texts,
            "texts_too_short": overlap.too_short,
            "files": _digests(evaluation_files),
        },
    }
    write_atomically(manifest_file, orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
    return manifest


def _train_files(key: str, one: SetConfig) -> list[Path]:
    files = find(f"{key}.paths", one.paths)
    for file in files if not one.split_field else []:
        check(
            not _EVALUATION & {*re.findall("[a-z]+", file.name.lower()), file.parent.name.lower()},
            f"{key}.paths: {file} is named like an evaluation split, and only train splits are converted; leave it out, rename it, "
            "or name the split_field of its rows",
        )
    return files


def _open_overlap(leave: DecontaminationConfig | None) -> tuple[Overlap | None, list[Path]]:
    if leave is None:
        return None, []
    files = find("decontaminate.paths", leave.paths)
    texts = (text for file in files for _, row in rows_of(file) if row for text in texts_in(row))
    overlap = Overlap(texts, leave.ngram, leave.shortest)
    check(
        len(overlap) > 0, f"decontaminate.paths: no text of {leave.shortest} words or more; name the evaluation files"
    )
    return overlap, files


def _thresholds(recipe: Recipe, files: dict[str, list[Path]], overlap: Overlap | None) -> dict[str, int]:
    """Return the largest key that is taken of each task that has more than `most_rows_per_task`."""
    most, kept = recipe.most_rows_per_task, {}
    if not most:
        return {}
    for example in _examples(recipe, files, overlap, {name: Counter() for name in recipe.sets}):
        heap = kept.setdefault(recipe.sets[example.name].task, [])
        # Negated, so that the largest of the smallest keys lies on top.
        (heapq.heappush if len(heap) < most else heapq.heappushpop)(heap, -example.key)
    return {task: -heap[0] for task, heap in kept.items()}


def _examples(
    recipe: Recipe, files: dict[str, list[Path]], overlap: Overlap | None, counts: dict[str, Counter]
) -> Iterator[Example]:
    """Yield the rows that may be trained on, and count the others."""
    for name, one in recipe.sets.items():
        for file in files[name]:
            for number, row in rows_of(file):
                counts[name]["read"] += 1
                made = _example(name, one, recipe.seed, file, number, row)
                if isinstance(made, Example) and overlap is not None:
                    texts = (*made.values.values(), made.answer)
                    made = "contaminated" if any(text in overlap for text in texts) else made
                if isinstance(made, Example):
                    yield made
                else:
                    counts[name][made] += 1


def _example(name: str, one: SetConfig, seed: int, file: Path, number: int, row: dict | None) -> Example | str:
    """Return the example of a row, or why there is none."""
    if row is None:
        return "unreadable"
    where = f"{file}, row {number}"
    if one.split_field and _field(where, number, f"sets.{name}.split_field", row, one.split_field) != "train":
        return "other_split"
    task = known_tasks()[one.task]
    values = {f: _field(where, number, f"sets.{name}.fields.{f}", row, key) for f, key in one.fields.items()}
    if not all(values.values()):
        return "empty"
    answer = values.pop(task.answer)
    if task.answer == "label":
        if answer in one.leave_out:
            return "label_left_out"
        check(
            answer in one.labels or not one.labels,
            f"{where}: the label is {answer[:50]!r}, and sets.{name}.labels has {', '.join(one.labels)}; add it there, or to leave_out",
        )
        answer = one.labels.get(answer, answer)
    content = orjson.dumps([seed, one.task, one.language, sorted(values.items()), answer])
    key = int.from_bytes(blake2b(content, digest_size=8).digest(), "big")
    values["labels"] = one.options or options_text(one.language, one.labels)
    if one.task == "translation":
        values["source"] = language_name(one.source_language, one.language)
        values["target"] = language_name(one.target_language, one.language)
    return Example(name, values, answer, key)


def _field(where: str, number: int, setting: str, row: dict, key: str) -> str:
    """Return the text of a field; empty if a later row than a file's first lacks it."""
    try:
        return text_of(value_at(row, key))
    except KeyError:
        if number > 1:
            return ""
        known = ", ".join(map(str, row)) or "none of its fields"
        raise ConfigError(f"{where}: {setting}={key!r} is not there; it has {known}") from None


def _digests(files: list[Path]) -> dict[str, dict]:
    return {str(file): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
