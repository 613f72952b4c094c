"""The best checkpoint of a run: chosen on one half of the items, and reported on the other.

The best of ten checkpoints that are really equal looks 1.5 standard errors better than it is on the items that chose it. So
those items do not say how good it is; the other half does.
"""

from dataclasses import dataclass

import numpy as np

from easylm_mling.errors import check
from easylm_mling.evaluation.results import Results, Score
from easylm_mling.storage.jsonl import read_jsonl

CHOOSING, REPORTED = 0, 1  # the halves of the items


@dataclass(frozen=True)
class Candidate:
    """A checkpoint's centred mean on each half of the items."""

    step: int
    choosing: float
    reported: float


def choose(results: dict[int, Results]) -> tuple[Candidate, list[Candidate]]:
    """Return the best step's candidate, and all of them in order. Of equally good ones the latest is the best.

    Raises ConfigError if no score is a mean of items, or a half has none.
    """
    candidates = []
    for step in sorted(results):
        halves = [centred_mean(results[step], half) for half in (CHOOSING, REPORTED)]
        candidates.append(Candidate(step, *halves))
    return max(candidates, key=lambda c: (c.choosing, c.step)), candidates


def centred_mean(results: Results, half: int) -> float:
    """Return the mean over scores of (accuracy - chance) / (1 - chance), on one half of the items.

    Chance is one over an item's number of choices, and 0 for a text that is written. Centred scores of tasks with other
    numbers of choices can be averaged (DCLM, Li et al. 2024).
    """
    items = list(read_jsonl(results.items))
    values = [v for score in _one_of_each(results.scores) if (v := _centred(score, items, half)) is not None]
    check(
        bool(values),
        f"{results.items}: half of its items has no measure that can be averaged; use a suite with more items",
    )
    return float(np.mean(values))


def _one_of_each(scores: list[Score]) -> list[Score]:
    """Return the first measure of each row, so that a task with several does not count more."""
    first: dict[str, Score] = {}
    for score in scores:
        first.setdefault(score.task, score)
    return list(first.values())


def _centred(score: Score, items: list[dict], half: int) -> float | None:
    right, chances = [], []
    for item in items:
        value = item["measures"].get(score.measure)
        ours = item["task"] in score.tasks and item["filter"] == score.variant and half_of(item) == half
        # An accuracy: perplexities and the like have no chance level.
        if ours and isinstance(value, (int, float)) and 0 <= value <= 1:
            choices = len(item.get("filtered_resps") or [])
            right.append(float(value))
            chances.append(1 / choices if choices > 1 else 0.0)
    if not right:
        return None
    chance = float(np.mean(chances))
    return (float(np.mean(right)) - chance) / (1 - chance)


def half_of(item: dict) -> int:
    """Return the half that an item is in, by the digest of its content: the same in every evaluation."""
    return int(str(item["doc_hash"])[:8], 16) % 2
