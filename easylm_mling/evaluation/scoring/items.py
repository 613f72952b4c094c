"""A small fixed part of a suite, whose scores need log-likelihoods only: what a run is scored on while it trains.

Bits per byte of right answers fall smoothly long before accuracies rise (OLMo's in-loop tasks). Accuracies are centred:
(accuracy - chance) / (1 - chance), so that tasks with other numbers of choices can be averaged (DCLM, Li et al. 2024).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.task import Task

from easylm_mling.errors import check
from easylm_mling.evaluation.scoring.tasks import LoadedRow

Answer = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would write it


@dataclass(frozen=True)
class Item:
    """One item of a row: its (context, continuation) requests, and which of them is the right answer."""

    row: str
    task: Task
    doc: dict
    pairs: list[tuple[str, str]]
    gold: int
    choices: int  # 0: a text that would be written, which has no accuracy here
    measure: str


def fixed_items(rows: Sequence[LoadedRow], most: int) -> list[Item]:
    """Return at most `most` items of each row, evenly spread over those of its tasks: always the same ones.

    Raises ConfigError for a task that is scored by whole texts.
    """
    items = []
    for row in rows:
        sizes = [len(task.eval_docs) for task in row.tasks.values()]
        picked = np.unique(np.linspace(0, sum(sizes) - 1, min(most, sum(sizes))).astype(int))
        first = 0
        for (name, task), size in zip(row.tasks.items(), sizes, strict=True):
            check(
                task.OUTPUT_TYPE != "loglikelihood_rolling",
                f"eval.suite: {name} scores whole texts, as held-out text does while a run trains; leave its row out",
            )
            numbers = [int(n) - first for n in picked if first <= n < first + size]
            first += size
            items += _items(row, task, numbers)
    return items


def _items(row: LoadedRow, task: Any, numbers: list[int]) -> list[Item]:
    items, measure, shots = [], row.row.measure or "acc", int(task.config.num_fewshot or 0)
    for number in numbers:
        doc = task.eval_docs[number]
        # Shots are drawn one item after another, as in the harness.
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        made = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, number, 1))
        if task.OUTPUT_TYPE == "generate_until":
            pairs = [(context, _text_of(task, doc))]
        else:
            pairs = [instance.args for instance in (made if isinstance(made, list) else [made])]
        kinds = {"generate_until": 0, "loglikelihood": 1}
        choices = kinds[task.OUTPUT_TYPE] if task.OUTPUT_TYPE in kinds else len(task.doc_to_choice(doc))
        gold = _gold_of(task, doc) if choices > 1 else 0
        items.append(Item(row.row.name, task, doc, pairs, gold, choices, measure))
    return items


def _text_of(task: Any, doc: dict) -> str:
    target = task.doc_to_target(doc)
    return f"{task.config.target_delimiter}{target[0] if isinstance(target, list) and target else target}"


def _gold_of(task: Any, doc: dict) -> int:
    # Of several right answers the first counts.
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    gold = gold[0] if isinstance(gold, list) else gold
    return gold if isinstance(gold, int) else task.doc_to_choice(doc).index(gold)


def score_items(items: Sequence[Item], answers: Sequence[Sequence[Answer]]) -> dict:
    """Return `{"bits_per_byte", "centred_accuracy", "rows": {row: the same, and "accuracy"}}` by the answers of each item.

    The numbers of the whole are means over rows. Bytes are those of the right answer's UTF-8, with the space before it.
    What cannot be had, or is not finite, is None.
    """
    rows = {}
    for name in dict.fromkeys(item.row for item in items):
        of_row = [(i, a) for i, a in zip(items, answers, strict=True) if i.row == name]
        nats = sum(a[i.gold][0] for i, a in of_row)
        size = sum(len(i.pairs[i.gold][1].encode()) for i, _ in of_row)
        bits = -nats / math.log(2) / size if size else math.nan
        values = [v for i, a in of_row if (v := _accuracy(i, a)) is not None]
        scores = {"bits_per_byte": bits if math.isfinite(bits) else None}
        if values:
            accuracy, chance = (float(x) for x in np.mean(values, axis=0))
            scores |= {"accuracy": accuracy, "centred_accuracy": (accuracy - chance) / (1 - chance)}
        rows[name] = scores
    return {key: _mean(rows, key) for key in ("bits_per_byte", "centred_accuracy")} | {"rows": rows}


def _accuracy(item: Item, answers: Sequence[Answer]) -> tuple[float, float] | None:
    """Return (the item's accuracy by its task's own rule, chance)."""
    if not item.choices or any(value != value for value, _ in answers):
        return None
    values: Any = item.task.process_results(item.doc, list(answers))
    value = values.get(item.measure)
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        return None
    return float(value), 1 / item.choices if item.choices > 1 else 0.0


def _mean(rows: dict[str, dict], key: str) -> float | None:
    values = [scores[key] for scores in rows.values() if scores.get(key) is not None]
    return float(np.mean(values)) if values else None
