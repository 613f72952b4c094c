"""The order of an epoch, and the shuffled documents of its blocks, as pure functions of the seed.

An epoch is a seeded permutation of a source's units, in which a unit may stand several times or not at all (language
temperature); neighbours in it are bundled into blocks of about `block_bytes`. So 400 languages, some of seven rows, are
one source: their units share blocks.
"""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from easylm_mling.data.catalog import Source
from easylm_mling.data.readers import Bad, read_unit

_ONE = 1 << 32


class Window(NamedTuple):
    """A shuffled portion of a block.

    The documents (UTF-8) of the wanted split, the bad records met, how many good ones were read, and whether the block
    ends here.
    """

    documents: list[bytes]
    bad: list[Bad]
    read: int
    last: bool


def seeded_bits(count: int, *key: int | str) -> np.ndarray:
    """uint64 [count], a function of `key` alone.

    Raw Philox output, because numpy promises that only raw bits stay the same in later versions.
    """
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(count)


def seeded_order(count: int, *key: int | str) -> np.ndarray:
    """int64 [count]: a permutation, a function of `key` alone."""
    return np.argsort(seeded_bits(count, *key), kind="stable")


class EpochOrder:
    """In which order the units of one source are read, epoch by epoch."""

    def __init__(self, source: Source, seed: int, block_bytes: int):
        self.source, self.seed, self.block_bytes = source, seed, block_bytes
        self._rates = _unit_rates(source)
        self._phases = (seeded_bits(len(source.units), seed, source.name, "phase") >> 32).astype(np.int64)
        # Known without putting the epoch in order: a lane may have to pass hundreds of epochs of a tiny source.
        self._one_block = bool(np.all(self._rates == _ONE)) and source.units[:, 3].sum() <= block_bytes
        # The other sources' lanes are at most a few epochs apart.
        self._epoch = lru_cache(maxsize=8)(self._order_epoch)

    def blocks(self, epoch: int) -> int:
        """How many blocks the epoch has, none of them empty."""
        if self._one_block:
            return 1
        bundle = self._epoch(epoch)[1]
        return int(bundle[-1]) + 1 if len(bundle) else 0

    def units(self, epoch: int, block: int) -> np.ndarray:
        """int64 [n]: the units of one block, in reading order."""
        units, bundle = self._epoch(epoch)
        return units[np.searchsorted(bundle, block) : np.searchsorted(bundle, block, side="right")]

    def copies(self, epoch: int) -> np.ndarray:
        """int64 [units]: how often each unit stands in the epoch.

        A rate of 2.3 means 2 or 3, and 23 times in ten epochs: seeded phases, not dice, so that a rare unit is never
        left out for long.
        """
        before = (self._phases + epoch * self._rates) // _ONE
        return (self._phases + (epoch + 1) * self._rates) // _ONE - before

    def _order_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        copies = self.copies(epoch)
        units = np.repeat(np.arange(len(copies)), copies)
        units = units[seeded_order(len(units), self.seed, self.source.name, epoch)]
        sizes = self.source.units[units, 3]
        # Renumbered after a unit larger than a block, for a block must not be empty: a lane takes every V-th block, and
        # might meet empty ones only, for ever.
        return units, np.unique((np.cumsum(sizes) - sizes) // self.block_bytes, return_inverse=True)[1]


def windows(order: EpochOrder, epoch: int, block: int, split: str = "train", skip: int = 0) -> Iterator[Window]:
    """The windows of a block from number `skip` on.

    A window is cut from the documents in reading order, so both splits agree on it, and its documents are shuffled. An
    ordinary block is one window; only what lies in units that cannot be cut small takes several, each of at most 1.5
    blocks and a document. Skipped windows are read (a .gz knows no other way) but cost nothing more. Raises ConfigError
    for a damaged file.
    """
    source, limit = order.source, order.block_bytes * 3 // 2
    number, size, texts, bad = 0, 0, [], []

    def close(last: bool) -> Window:
        key = (order.seed, source.name, epoch, block, number)
        chosen = _choose(texts, split, source.settings["holdout_fraction"])
        shuffled = [chosen[i] for i in seeded_order(len(chosen), *key).tolist()]
        return Window(shuffled, bad, len(texts), last)

    for record in _records(source, order.units(epoch, block)):
        if size >= limit:
            # Popped, so that a generator at rest, of which there may be hundreds, holds no window.
            ready = [close(last=False)] if number >= skip else []
            number, size, texts, bad = number + 1, 0, [], []
            if ready:
                yield ready.pop()
        if isinstance(record, Bad):
            bad.append(record)
            size += len(record.head)
        else:
            texts.append(record)
            size += len(record)
    if number >= skip:
        yield close(last=True)


def epoch_windows(order: EpochOrder, epoch: int, split: str) -> Iterator[Window]:
    """All windows of an epoch, block by block."""
    for block in range(order.blocks(epoch)):
        yield from windows(order, epoch, block, split)


def _records(source: Source, units: np.ndarray) -> Iterator[bytes | Bad]:
    column, row = source.settings["text_column"], source.settings["row"]
    for index, start, end, _ in source.units[units].tolist():
        file = source.files[index]
        yield from read_unit(file.name, file.layout, start, end, column, row)


def _choose(texts: list[bytes], split: str, holdout_fraction: float) -> list[bytes]:
    """Those of one split. A document's own hash decides, so its copies, in any file, are all on the same side."""
    assert split in ("train", "holdout"), split
    threshold = int(holdout_fraction * 2**64)
    if threshold == 0:
        return texts if split == "train" else []
    held_out = [int.from_bytes(blake2b(text, digest_size=8).digest(), "big") < threshold for text in texts]
    return [text for text, held in zip(texts, held_out, strict=True) if held == (split == "holdout")]


def _unit_rates(source: Source) -> np.ndarray:
    """int64 [units]: how often a unit stands in an epoch on average, in units of 2**-32.

    A language's share is its bytes ** temperature, scaled so that an epoch keeps its bytes; what a language over the
    cap gives up is shared out among the rest (UniMax, arXiv:2304.09151).
    """
    temperature, cap = source.settings["language_temperature"], source.settings["language_max_repeats"]
    if temperature == 1 or len(source.languages) == 1:
        return np.full(len(source.units), _ONE, np.int64)
    sizes = np.bincount(source.unit_languages, weights=source.units[:, 3], minlength=len(source.languages)).tolist()
    free = [i for i, size in enumerate(sizes) if size > 0]
    rates, left = [float(cap)] * len(sizes), sum(sizes)
    while free:
        # Python's power, not numpy's: the vectorised one may differ between processors in the last bit.
        scale = left / sum(sizes[i] ** temperature for i in free)
        wanted = {i: scale * sizes[i] ** temperature / sizes[i] for i in free}
        over = [i for i in free if wanted[i] > cap]
        left -= sum(cap * sizes[i] for i in over)
        free = [i for i in free if wanted[i] <= cap] if over else []
        if not over:
            for i, rate in wanted.items():
                rates[i] = rate
    return np.array([round(rate * _ONE) for rate in rates], np.int64)[source.unit_languages]
