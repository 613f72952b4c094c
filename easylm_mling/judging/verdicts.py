"""What a judge's replies say: marks with their errors, comparisons in both orders, and how far to trust them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from easylm_mling.judging.answering import Answer
from easylm_mling.judging.asking import Reply, Request
from easylm_mling.judging.questions import (
    HIGHEST,
    LANGUAGES,
    Question,
    language_of,
    mark_messages,
    pair_messages,
    read_mark,
    read_verdict,
)


@dataclass(frozen=True)
class Judged:
    """One question: its answer, the marks (None: no mark in a reply), and each reply or failure."""

    question: Question
    answer: Answer
    marks: list[float | None]
    replies: list[Reply]

    @property
    def mark(self) -> float | None:
        """The mean of the marks; None if there is none. A failure is no zero."""
        known = [m for m in self.marks if m is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Compared:
    """One question's two answers: 1 if ours is better, 0 if the baseline's, 0.5 for a tie; None without two verdicts.

    `agreed`: both orders name the same answer, or both a tie. Where they do not, it is a tie.
    """

    question: Question
    outcome: float | None
    agreed: bool | None
    longer: int  # letters by which our answer is longer
    replies: list[Reply]


def mark_requests(questions: Sequence[Question], answers: dict[str, Answer], repeats: int) -> list[Request]:
    """Return what to ask for the marks, `repeats` for each question."""
    return [Request(mark_messages(q, answers[q.id].text), n) for q in questions for n in range(repeats)]


def judged(questions: Sequence[Question], answers: dict[str, Answer], replies: Sequence[Reply]) -> list[Judged]:
    """Return each question with its marks, by the replies to `mark_requests`."""
    repeats, out = len(replies) // len(questions), []
    for n, question in enumerate(questions):
        own = list(replies[n * repeats : (n + 1) * repeats])
        marks = [None if r.failure else read_mark(r.text) for r in own]
        out.append(Judged(question, answers[question.id], marks, own))
    return out


def pair_requests(questions: Sequence[Question], ours: dict[str, str], theirs: dict[str, str]) -> list[Request]:
    """Return what to ask for the comparisons: ours first, then theirs first."""
    pairs = [((ours[q.id], theirs[q.id]), (theirs[q.id], ours[q.id])) for q in questions]
    return [Request(pair_messages(q, *order)) for q, both in zip(questions, pairs, strict=True) for order in both]


def compared(
    questions: Sequence[Question], ours: dict[str, str], theirs: dict[str, str], replies: Sequence[Reply]
) -> list[Compared]:
    """Return each question's comparison, by the replies to `pair_requests`."""
    out = []
    for n, question in enumerate(questions):
        both = list(replies[2 * n : 2 * n + 2])
        first, second = (None if r.failure else read_verdict(r.text) for r in both)
        longer = len(ours[question.id]) - len(theirs[question.id])
        if first is None or second is None:
            out.append(Compared(question, None, None, longer, both))
            continue
        agreed = second == {"first": "second", "second": "first", "tie": "tie"}[first]
        outcome = {"first": 1.0, "second": 0.0, "tie": 0.5}[first] if agreed else 0.5
        out.append(Compared(question, outcome, agreed, longer, both))
    return out


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; NaN where there are too few values."""
    if not values:
        return math.nan, math.nan
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def summary(items: Sequence[Judged]) -> dict:
    """Return the marks of all questions, of each language and of each category, and how far to trust them."""
    groups: dict[str, list[Judged]] = {"all": list(items)}
    for item in items:
        groups.setdefault(item.question.language, []).append(item)
    for item in items:
        if item.question.category:
            groups.setdefault(item.question.category, []).append(item)
    unread = sum(m is None and not r.failure for i in items for m, r in zip(i.marks, i.replies, strict=True))
    ended = [i.answer.ended for i in items if i.answer.ended is not None]
    several = [i for i in items if sum(m is not None for m in i.marks) > 1]
    same = [len({m for m in i.marks if m is not None}) == 1 for i in several]
    return {
        "marks": {name: _marks(group) for name, group in groups.items()},
        "without a mark": unread,
        "repeats agree": _share(same),
        "answers ended by themselves": _share([bool(e) for e in ended]),
        "answers in its language": _share(
            [language_of(i.answer.text) == i.question.language for i in items if i.question.language in LANGUAGES]
        ),
        "letters in an answer": mean_and_error([float(len(i.answer.text)) for i in items])[0],
        "empty answers": sum(not i.answer.text for i in items),
    }


def mark_difference(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, float, int]:
    """Return the mean difference of two models' marks on the same questions, its standard error, and their number."""
    both = sorted(ours.keys() & theirs.keys())
    return (*mean_and_error([ours[q] - theirs[q] for q in both]), len(both))


def comparison_summary(pairs: Sequence[Compared]) -> dict:
    """Return the share of wins (a tie counts half), its error, and what may explain it otherwise."""
    known = [p for p in pairs if p.outcome is not None]
    rate, error = mean_and_error([p.outcome for p in known if p.outcome is not None])
    won = [p for p in known if p.agreed and p.outcome != 0.5]
    longer = [(p.outcome == 1) == (p.longer > 0) for p in won if p.longer]
    return {
        "compared": len(known), "without a verdict": len(pairs) - len(known), "win rate": rate, "error": error,
        "wins": sum(p.outcome == 1 for p in known), "losses": sum(p.outcome == 0 for p in known),
        "ties": sum(bool(p.agreed) and p.outcome == 0.5 for p in known),
        "orders disagree": _share([not p.agreed for p in known]),
        "the longer one won": _share(longer),
        "letters longer": mean_and_error([float(p.longer) for p in pairs])[0],
    }  # fmt: skip


def _marks(group: Sequence[Judged]) -> dict:
    marks = [i.mark for i in group if i.mark is not None]
    mean, error = mean_and_error(marks)
    return {
        "questions": len(group),
        "marked": len(marks),
        "mean": mean,
        "error": error,
        "percent": mean / HIGHEST * 100,
    }


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
