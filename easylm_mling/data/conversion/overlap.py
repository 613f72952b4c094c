"""Overlap of texts with evaluation files, by n-grams of words. In memory are hashes of the evaluation files' n-grams only."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

# A word, or a letter of a script without spaces: kana and ideographs.
_UNITS = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]|(?:(?![\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff])[^\W_])+"
)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0
_AT_ONCE = 1 << 20


class Overlap:
    """The n-grams of texts. A text shorter than `ngram` words, down to `shortest`, is one n-gram of its own length."""

    def __init__(self, texts: Iterable[str], ngram: int, shortest: int):
        self._by_length: dict[int, np.ndarray] = {}
        self.texts = self.too_short = 0
        self._ngram = ngram
        waiting: dict[int, list[np.ndarray]] = {}
        size = 0
        for text in texts:
            units = _hashes(text)
            self.texts += 1
            if len(units) < shortest:
                self.too_short += 1
                continue
            length = min(len(units), ngram)
            waiting.setdefault(length, []).append(ngrams(units, length))
            size += len(waiting[length][-1])
            if size > _AT_ONCE:
                self._merge(waiting)
                waiting, size = {}, 0
        self._merge(waiting)

    def __len__(self) -> int:
        return sum(map(len, self._by_length.values()))

    def __contains__(self, text: str) -> bool:
        """Return True if the text holds any of the n-grams."""
        units = _hashes(text)
        for length, known in self._by_length.items():
            if len(units) >= length:
                own = ngrams(units, length)
                at = np.minimum(np.searchsorted(known, own), len(known) - 1)
                if (known[at] == own).any():
                    return True
        return False

    def _merge(self, waiting: dict[int, list[np.ndarray]]):
        for length, parts in waiting.items():
            known = [self._by_length[length]] if length in self._by_length else []
            self._by_length[length] = np.unique(np.concatenate([*known, *parts]))


def ngrams(units: np.ndarray, length: int) -> np.ndarray:
    """Return the hash of every `length` units in a row of uint64 [N], uint64 [N - length + 1]: a polynomial modulo 2**64."""
    total = np.zeros(len(units) - length + 1, np.uint64)
    for i in range(length):
        total = total * _BASE + units[i : i + len(total)]
    return total


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text inside a row's values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def _hashes(text: str) -> np.ndarray:
    """Return the hash of each word, in any case, width and punctuation, uint64 [N]."""
    return np.array([_hash(word) for word in _UNITS.findall(unicodedata.normalize("NFKC", text).casefold())], np.uint64)


@lru_cache(1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")
