"""The questions, and the words in which a judge is asked about an answer."""

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib import resources
from pathlib import Path

from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.errors import ConfigError, check

HIGHEST = 5  # marks go from 0 to this
LANGUAGES = ("ko", "ja", "zh", "en")  # that `language_of` tells apart
_KEYS = {"id", "language", "category", "question", "reference"}
# What models that were taught by text write at the end of an answer; a judge takes it for a fault.
_END_MARKS = re.compile(r"(?:\s*(?:</s>|<\|endoftext\|>|<\|eot_id\|>|<\|im_end\|>|<end_of_turn>|<eos>|<turn\|>))+\s*$")


@dataclass(frozen=True)
class Question:
    """One question. `language` is a code such as ko; the judge is asked in it where there are words for it."""

    id: str
    language: str
    question: str
    category: str = ""
    reference: str = ""  # what a right answer says


def load_questions(path: str) -> list[Question]:
    """Read the questions in a .jsonl file. Raises ConfigError that names the first bad line."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the questions cannot be read ({error}); see data/judge/questions.jsonl") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            questions.append(_question(line, f"{path}, line {number}"))
    check(bool(questions), f"{path}: holds no question")
    names = [q.id for q in questions]
    twice = next((name for name in names if names.count(name) > 1), None)
    check(twice is None, f"{path}: the id {twice!r} stands in it twice")
    return questions


def questions_digest(questions: list[Question]) -> str:
    """Return a digest of the questions in their order."""
    return blake2b(json.dumps([vars(q) for q in questions]).encode(), digest_size=8).hexdigest()


def without_end_marks(answer: str) -> str:
    """Return an answer without the names of end tokens behind it."""
    return _END_MARKS.sub("", answer).strip()


def mark_messages(question: Question, answer: str) -> list[dict[str, str]]:
    """Return what the judge is asked about one answer: a reason, then a mark from 0 to 5."""
    return _messages(question, "mark", answer=_or_nothing(answer))


def pair_messages(question: Question, first: str, second: str) -> list[dict[str, str]]:
    """Return what the judge is asked about two answers: a reason, then which is better."""
    return _messages(question, "pair", first=_or_nothing(first), second=_or_nothing(second))


def words_digest() -> str:
    """Return a digest of the words in which judges are asked: marks of other words are other marks."""
    return blake2b(json.dumps(_words(), sort_keys=True).encode(), digest_size=8).hexdigest()


def read_mark(reply: str) -> float | None:
    """Return the mark in a judge's reply, the last one; None if there is none from 0 to 5."""
    found = re.findall(r'"score"\s*:\s*"?(-?\d+(?:\.\d+)?)\s*(?:/\s*5)?"?\s*[,}]', reply)
    mark = float(found[-1]) if found else -1.0
    return mark if 0 <= mark <= HIGHEST else None


def read_verdict(reply: str) -> str | None:
    """Return `first`, `second` or `tie`, the last one in a judge's reply; None if there is none."""
    found = re.findall(r'"better"\s*:\s*"(first|second|tie)"', reply, re.IGNORECASE)
    return found[-1].lower() if found else None


def language_of(text: str) -> str | None:
    """Return ko, ja, zh or en by the letters that prevail in `text`; None for another script, or no letters."""
    counts = {"ko": 0, "kana": 0, "han": 0, "en": 0, "other": 0}
    for letter in text:
        if letter.isalpha():
            name = unicodedata.name(letter, "")
            kinds = (("HANGUL", "ko"), ("HIRAGANA", "kana"), ("KATAKANA", "kana"), ("CJK", "han"), ("LATIN", "en"))
            counts[next((kind for start, kind in kinds if name.startswith(start)), "other")] += 1
    # Japanese is written in both; Chinese has no kana. A letter of Latin is a part of a word, the others are much of one.
    japanese = counts["kana"] + counts["han"] if counts["kana"] * 10 > counts["han"] else 0
    weights = {"ko": 3 * counts["ko"], "ja": 3 * japanese, "zh": 0 if japanese else 3 * counts["han"],
               "en": counts["en"], "other": 2 * counts["other"]}  # fmt: skip
    best = max(weights, key=lambda name: weights[name])
    return best if weights[best] and best != "other" else None


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where}: is no JSON; write one object a line") from None
    right = isinstance(row, dict) and {"id", "language", "question"} <= row.keys() <= _KEYS
    right = right and all(isinstance(value, str) for value in row.values())
    check(right, f"{where}: a question has the texts id, language and question, and may have category and reference")
    check(bool(row["question"].strip()) and bool(row["id"]), f"{where}: its id or question is empty")
    return Question(**row)


@cache
def _words() -> dict[str, dict[str, str]]:
    tree = read_yaml(resources.files("easylm_mling.judging").joinpath("words.yaml").read_bytes())
    assert isinstance(tree, dict)
    return tree


def _messages(question: Question, kind: str, **answers: str) -> list[dict[str, str]]:
    words = _words()[question.language if question.language in _words() else "en"]
    parts = {"question": question.question, "reference": question.reference, **answers}
    # Filled in one pass, so that a text which looks like a place of the form is not filled once more.
    form = words[kind].replace("{about_reference}", words["reference"] if question.reference else "")
    text = re.sub(r"\{(\w+)\}", lambda place: parts[place[1]], form)
    return [{"role": "system", "content": words["role"].strip()}, {"role": "user", "content": text.strip()}]


def _or_nothing(answer: str) -> str:
    return answer if answer.strip() else "-"
