"""The order of an epoch and the shuffled documents of its blocks, as pure functions of the seed.

An epoch is a seeded permutation of a source's units. By the rate of its language a unit may be in it more than once, or
not at all. Neighbours are bundled into blocks of about `block_bytes`. So 400 languages, some of seven rows, can be one
source: their units share blocks.
"""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple
from unicodedata import is_normalized, normalize

import numpy as np
import orjson

from easylm_mling.config import ConversationConfig, MixerConfig, from_tree
from easylm_mling.data.catalog import RUN_HOLDOUT, Catalog, Source
from easylm_mling.data.conversations.reading import read_conversations
from easylm_mling.data.sources.readers import BadRecord, read_unit
from easylm_mling.data.weights import ONE, MixingPlan, first_epoch_after, language_rates

# Makes the hash that samples a source independent of the one that holds documents out.
_SAMPLE_SALT = b"sample"
# Least blocks a lane and epoch.
_BLOCKS_A_LANE = 4


class Window(NamedTuple):
    """A shuffled portion of a block.

    `documents` are those of the chosen split, in UTF-8. `provenance`, int64 [documents, 2]: each one's unit, and its
    number among the unit's good documents. `bad_units`: the unit of each bad record that counts; more may be listed.
    `good` counts the good documents of both splits. `last` ends the block.
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


class EpochOrder:
    """The order in which the units of one source are read, epoch by epoch. `epochs` is how many there are, or None."""

    def __init__(
        self, source: Source, seed: int, block_bytes: int, rates: np.ndarray | None = None, lanes: int | None = None
    ):
        """Take the languages' `rates`, int64 [languages] (weights.language_rates); by default those by bytes.

        With `lanes`, every epoch is cut into as many blocks for each of them, alike in bytes, if it has that many units.
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
        digest = blake2b(orjson.dumps(parts), digest_size=16)
        digest.update(source.units.tobytes())
        digest.update(self._rates.tobytes())
        return digest.hexdigest()

    def blocks(self, epoch: int) -> int:
        """Return how many blocks the epoch has; none of them is empty."""
        if self._one_block:
            return int(self.epochs is None or epoch < self.epochs)
        bundle = self._epoch(epoch)[1]
        return int(bundle[-1]) + 1 if len(bundle) else 0

    def blocks_up_to(self, limit: int) -> int:
        """Return how many blocks all epochs have together, at most `limit`."""
        total, epoch = 0, 0
        while self.epochs is not None and epoch < self.epochs and total < limit:
            total, epoch = total + self.blocks(epoch), epoch + 1
        return limit if self.epochs is None else min(total, limit)

    def units(self, epoch: int, block: int) -> np.ndarray:
        """Return the units of one block in reading order, int64 [n]."""
        units, bundle = self._epoch(epoch)
        return units[np.searchsorted(bundle, block) : np.searchsorted(bundle, block, side="right")]

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
    per_lane = min(max(_BLOCKS_A_LANE, -(-total // (lanes * block_bytes))), count // lanes)
    blocks = lanes * per_lane
    even = (np.cumsum(sizes) - sizes // 2) * blocks // max(1, total)
    # Moved by as little as leaves none empty: numbers rise by at most one a unit, and reach the last block.
    index = np.arange(count)
    even = np.clip(np.minimum(even, index), index - count + blocks, blocks - 1)
    return np.minimum.accumulate(even - index) + index


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

    for unit in order.units(epoch, block).tolist():
        ordinal = -1
        for record in unit_records(source, unit):
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


def unit_records(source: Source, unit: int) -> Iterator[bytes | BadRecord]:
    """Yield the documents (UTF-8) of one unit in the file's order, and the bad records between them.

    Raises ConfigError for a file that is damaged, unreadable, or another than the one that was listed.
    """
    if "conversations" in source.settings:
        for item in unit_conversations(source, unit):
            yield item if isinstance(item, BadRecord) else item[2]
        return
    index, start, end, _ = source.units[unit].tolist()
    file, column, row = source.files[index], source.settings["text_column"], source.settings["row"]
    source.check_file(index)
    yield from read_unit(file.name, file.layout, start, end, column, row, source.retry)


def unit_conversations(source: Source, unit: int) -> Iterator[tuple[int, bytes, bytes] | BadRecord]:
    """Yield (offset, head, canonical JSON) of one unit's conversations, and its bad records; raises as `unit_records`."""
    index, start, end, _ = source.units[unit].tolist()
    file = source.files[index]
    config = from_tree(ConversationConfig, source.settings["conversations"]["config"])
    source.check_file(index)
    yield from read_conversations(file.name, file.layout, start, end, config, source.retry)


def choose(texts: list[bytes], split: str, settings: dict) -> list[int]:
    """Return which of the texts are of one split: `holdout`, what the source validates on, or `train`.

    A hash of the normalised text decides, by the largest holdout_fraction of the run's sources. So a text that one
    source holds out is trained on through no other one, either, and neither is a copy with other white space.
    """
    assert split in ("train", "holdout"), split
    held_out = settings["holdout_fraction"]
    if split == "train":
        held_out = max(held_out, settings.get(RUN_HOLDOUT, 0))
    chosen = list(range(len(texts)))
    if held_out or split == "holdout":
        limit = int(held_out * 2**64)
        chosen = [i for i in chosen if (_hash(normalised(texts[i])) < limit) == (split == "holdout")]
    if split == "train" and settings["sample_fraction"] < 1:
        sampled = int(settings["sample_fraction"] * 2**64)
        chosen = [i for i in chosen if _hash(texts[i], _SAMPLE_SALT) < sampled]
    return chosen


def normalised(text: bytes) -> bytes:
    """Return UTF-8 text in Unicode's form NFKC, each run of white space a space, none at either end."""
    characters = text.decode()
    # Nearly all text is normalised, and finding that out is cheap.
    if not is_normalized("NFKC", characters):
        characters = normalize("NFKC", characters)
    return " ".join(characters.split()).encode()


def _hash(text: bytes, salt: bytes = b"") -> int:
    return int.from_bytes(blake2b(text, digest_size=8, salt=salt).digest(), "big")
