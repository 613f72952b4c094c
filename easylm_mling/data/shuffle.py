"""The order of an epoch and the shuffled documents of its blocks, as pure functions of the seed.

An epoch is a seeded permutation of a source's units. By the rate of its language a unit may be in it more than once, or
not at all. Neighbours are bundled into blocks of about `block_bytes`. So 400 languages, some of seven rows, can be one
source: their units share blocks.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import orjson

from easylm_mling.config import ConversationConfig, MixerConfig, from_tree
from easylm_mling.data.catalog import SHARES_UNITS, Catalog, Source
from easylm_mling.data.conversations.reading import read_conversations
from easylm_mling.data.sources.readers import BadRecord, read_unit
from easylm_mling.data.splits import choose
from easylm_mling.data.weights import ONE, MixingPlan, first_epoch_after, language_rates

# Least blocks a lane and epoch.
_BLOCKS_A_LANE = 4
# With so many units a lane and epoch, whole ones make lanes even enough. With fewer, units are shared.
_EVEN_UNITS = 32
# A golden ratio of all 64-bit numbers: its multiples fall evenly into any range of them.
_GOLDEN, _ALL = 0x9E3779B97F4A7C15, 1 << 64


class Window(NamedTuple):
    """A shuffled portion of a block.

    `documents` are those of the chosen split, in UTF-8. `provenance`, int64 [documents, 2]: each one's unit, and its
    number among the unit's good documents, or those of the block's part of it. `bad_units`: the unit of each bad record
    that counts; more may be listed. `good` counts the good documents of both splits. `last` ends the block.
    """

    documents: list[bytes]
    provenance: np.ndarray
    bad: list[BadRecord]
    bad_units: list[int]
    good: int
    last: bool


def seeded_bits(count: int, *key: int | str) -> np.ndarray:
    """Return random bits, uint64 [count], a function of `key` alone.

    They are raw Philox output: numpy promises of no other random number that later versions keep it.
    """
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(count)


def seeded_order(count: int, *key: int | str) -> np.ndarray:
    """Return a permutation of range(count), int64 [count], a function of `key` alone."""
    return np.argsort(seeded_bits(count, *key), kind="stable")


class Part(NamedTuple):
    """What a block has of a unit: the records, by their number in it, whose multiple of the golden ratio is in [low, high)."""

    unit: int
    low: int = 0
    high: int = _ALL
    phase: int = 0

    def holds(self, number: int) -> bool:
        """Return True for a record of this part."""
        return self.low <= (number * _GOLDEN + self.phase) % _ALL < self.high

    @property
    def is_whole(self) -> bool:
        """True for all the unit's records."""
        return self.high - self.low == _ALL


def shares_units(source: Source, lanes: int) -> bool:
    """Return True if whole units would be dealt unevenly to the lanes, so that neighbouring blocks share units."""
    sizes = source.units[:, 3]
    return source.dealing >= SHARES_UNITS and int(sizes.max()) * lanes * _EVEN_UNITS > int(sizes.sum())


class EpochOrder:
    """The order in which the units of one source are read, epoch by epoch. `epochs` is how many there are, or None."""

    def __init__(
        self, source: Source, seed: int, block_bytes: int, rates: np.ndarray | None = None, lanes: int | None = None
    ):
        """Take the languages' `rates`, int64 [languages] (weights.language_rates); by default those by bytes.

        With `lanes`, every epoch is cut into as many blocks for each of them, alike in bytes.
        """
        self.source, self.seed, self.block_bytes, self.lanes = source, seed, block_bytes, lanes
        rates = language_rates(source, [], 0.0) if rates is None else rates
        self._rates = rates[source.unit_languages]
        self._phases = (seeded_bits(len(source.units), seed, source.name, "phase") >> 32).astype(np.int64)
        self._cap = source.settings["max_epochs"]
        # How many epochs hold anything; None: no end.
        self.epochs = first_epoch_after(self._rates, self._phases, self._cap) if self._cap else None
        # Known without ordering the epoch: a lane may have to pass hundreds of epochs of a tiny source.
        is_small = source.units[:, 3].sum() <= block_bytes and (lanes is None or len(source.units) < lanes)
        self._one_block = bool(np.all(self._rates == ONE)) and is_small
        self.shares_units = lanes is not None and shares_units(source, lanes)
        self._one_block &= not self.shares_units
        # The other sources' lanes are at most a few epochs apart.
        self._epoch = lru_cache(maxsize=8)(self._order_epoch)

    @property
    def fingerprint(self) -> str:
        """Hex digest (128 bits) of everything that decides which document of the source comes when."""
        source = self.source
        parts = [
            source.name,
            source.settings,
            [(f.name, f.fingerprint) for f in source.files],
            self.seed,
            self.block_bytes,
            self.lanes,
        ]
        if self.shares_units:
            parts.append(SHARES_UNITS)
        digest = blake2b(orjson.dumps(parts), digest_size=16)
        digest.update(source.units.tobytes())
        digest.update(self._rates.tobytes())
        return digest.hexdigest()

    def blocks(self, epoch: int) -> int:
        """Return how many blocks the epoch has; none of them is empty."""
        if self._one_block:
            return int(self.epochs is None or epoch < self.epochs)
        units, bundle = self._epoch(epoch)
        if self.shares_units:
            return self._shared_blocks() if len(units) else 0
        return int(bundle[-1]) + 1 if len(bundle) else 0

    def blocks_up_to(self, limit: int) -> int:
        """Return how many blocks all epochs have together, at most `limit`."""
        total, epoch = 0, 0
        while self.epochs is not None and epoch < self.epochs and total < limit:
            total, epoch = total + self.blocks(epoch), epoch + 1
        return limit if self.epochs is None else min(total, limit)

    def units(self, epoch: int, block: int) -> np.ndarray:
        """Return the units of one block in reading order, int64 [n]."""
        return np.array([part.unit for part in self.parts(epoch, block)], np.int64)

    def parts(self, epoch: int, block: int) -> list[Part]:
        """Return the parts of units of one block in reading order."""
        units, bundle = self._epoch(epoch)
        if not self.shares_units:
            first, last = np.searchsorted(bundle, block), np.searchsorted(bundle, block, side="right")
            return [Part(unit) for unit in units[first:last].tolist()]
        # The units are one line of bytes, and blocks are equal pieces of it: `bundle` has the units' ends on the line.
        blocks, total = self._shared_blocks(), int(bundle[-1])
        begin, end = block * total // blocks, (block + 1) * total // blocks
        parts = []
        for i in range(int(np.searchsorted(bundle, begin, side="right")), len(units)):
            start, stop = int(bundle[i - 1]) if i else 0, int(bundle[i])
            if start >= end:
                break
            low, high = ((min(max(at - start, 0), stop - start) << 64) // (stop - start) for at in (begin, end))
            if low < high:
                phase = int(seeded_bits(1, self.seed, self.source.name, epoch, i, "part")[0])
                parts.append(Part(int(units[i]), low, high, phase))
        return parts

    def _shared_blocks(self) -> int:
        """Return the blocks of an epoch whose units are shared: so few that not many lanes read a unit."""
        assert self.lanes is not None
        return self.lanes * _blocks_a_lane(self.source.units[:, 3], self.lanes, self.block_bytes)

    def copies(self, epoch: int) -> np.ndarray:
        """Return how often each unit is read in the epoch, int64 [units].

        A rate of 2.3 means 2 or 3 times, and 23 times in ten epochs. Seeded phases decide it, not dice, so that no rare
        unit is left out for long. Over all epochs no unit is read more than `max_epochs` times.
        """
        before, after = ((self._phases + e * self._rates) // ONE for e in (epoch, epoch + 1))
        return np.minimum(after, self._cap) - np.minimum(before, self._cap) if self._cap else after - before

    def _order_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        copies = self.copies(epoch)
        units = np.repeat(np.arange(len(copies)), copies)
        units = units[seeded_order(len(units), self.seed, self.source.name, epoch)]
        sizes = self.source.units[units, 3]
        if self.shares_units:
            return units, np.cumsum(np.maximum(sizes, 1))
        if self.lanes and len(units) >= self.lanes:
            return units, _even_blocks(sizes, self.lanes, self.block_bytes)
        # Renumbered, for behind a unit larger than a block there would be empty ones. A lane takes every V-th block, and
        # might get nothing but those.
        return units, np.unique((np.cumsum(sizes) - sizes) // self.block_bytes, return_inverse=True)[1]


def _even_blocks(sizes: np.ndarray, lanes: int, block_bytes: int) -> np.ndarray:
    """Return the block of each unit of an epoch, int64 [units]: `lanes` times k blocks, none of them empty.

    Lane l takes the blocks l, l + lanes ..., so k of every epoch. They are as even in bytes as whole units allow, and of
    about `block_bytes` at most; k is at least 4 if there are units for it.
    """
    total, count = int(sizes.sum()), len(sizes)
    blocks = lanes * _blocks_a_lane(sizes, lanes, block_bytes)
    even = (np.cumsum(sizes) - sizes // 2) * blocks // max(1, total)
    # Moved by as little as leaves none empty: numbers rise by at most one a unit, and reach the last block.
    index = np.arange(count)
    even = np.clip(np.minimum(even, index), index - count + blocks, blocks - 1)
    return np.minimum.accumulate(even - index) + index


def _blocks_a_lane(sizes: np.ndarray, lanes: int, block_bytes: int) -> int:
    blocks = max(_BLOCKS_A_LANE, -(-int(sizes.sum()) // (lanes * block_bytes)))
    return max(1, min(blocks, len(sizes) // lanes))


def open_orders(config: MixerConfig, catalog: Catalog, plan: MixingPlan) -> list[EpochOrder]:
    """Return the order of every source, the same for the loader and for `data tokenize`."""
    rates, data = plan.language_rates, config.data
    return [
        EpochOrder(s, data.seed, data.block_bytes, rates.get(s.name), config.lanes) for s in catalog.sources.values()
    ]


def windows(order: EpochOrder, epoch: int, block: int, split: str = "train", skip: int = 0) -> Iterator[Window]:
    """Yield the windows of a block from number `skip` on.

    A window is cut in reading order, so that both splits agree on it; then its documents are shuffled. A block is one
    window, unless it has units that cannot be cut small: then a window holds at most 1.5 blocks and a document. Skipped
    windows are read, since a .gz knows no other way, but not shuffled. Raises ConfigError for a damaged file.
    """
    source, limit = order.source, order.block_bytes * 3 // 2
    number, size, texts, provenance, bad, bad_units = 0, 0, [], [], [], []

    def close(last: bool) -> Window:
        key = (order.seed, source.name, epoch, block, number)
        chosen = choose(texts, split, source.settings)
        shuffled = [chosen[i] for i in seeded_order(len(chosen), *key).tolist()]
        origin = np.array([provenance[i] for i in shuffled], np.int64).reshape(-1, 2)
        return Window([texts[i] for i in shuffled], origin, bad, bad_units, len(texts), last)

    for part in order.parts(epoch, block):
        unit, ordinal = part.unit, -1
        for record in unit_records(source, unit, None if part.is_whole else part.holds):
            if size >= limit:
                # Popped, so that a suspended generator, of which there may be hundreds, holds no window.
                ready = [close(last=False)] if number >= skip else []
                number, size, texts, provenance, bad, bad_units = number + 1, 0, [], [], [], []
                if ready:
                    yield ready.pop()
            if isinstance(record, BadRecord):
                bad.append(record)
                bad_units.append(unit)
                size += len(record.head)
            else:
                provenance.append((unit, ordinal := ordinal + 1))
                texts.append(record)
                size += len(record)
    if number >= skip:
        yield close(last=True)


def epoch_windows(order: EpochOrder, epoch: int, split: str) -> Iterator[Window]:
    """Yield all windows of an epoch, block by block."""
    for block in range(order.blocks(epoch)):
        yield from windows(order, epoch, block, split)


def unit_records(source: Source, unit: int, holds: Callable[[int], bool] | None = None) -> Iterator[bytes | BadRecord]:
    """Yield the documents (UTF-8) of one unit in the file's order, and the bad records between them.

    With `holds`, only those are read whose number in the unit, bad ones counted, it returns True for.
    Raises ConfigError for a file that is damaged, unreadable, or another than the one that was listed.
    """
    if "conversations" in source.settings:
        for item in unit_conversations(source, unit, holds):
            yield item if isinstance(item, BadRecord) else item[2]
        return
    index, start, end, _ = source.units[unit].tolist()
    file, column, row = source.files[index], source.settings["text_column"], source.settings["row"]
    source.check_file(index)
    yield from read_unit(file.name, file.layout, start, end, column, row, source.retry, holds)


def unit_conversations(
    source: Source, unit: int, holds: Callable[[int], bool] | None = None
) -> Iterator[tuple[int, bytes, bytes] | BadRecord]:
    """Yield (offset, head, canonical JSON) of one unit's conversations, and its bad records, as `unit_records` does."""
    index, start, end, _ = source.units[unit].tolist()
    file = source.files[index]
    config = from_tree(ConversationConfig, source.settings["conversations"]["config"])
    source.check_file(index)
    yield from read_conversations(file.name, file.layout, start, end, config, source.retry, holds)
