"""Small sources, dealt document by document: a lane that needs a document takes the next one of the epoch.

Blocks are too coarse to share a small source out evenly. So every host tokenises it once, into an unlinked temporary
file, and keeps the documents' lengths. With them it follows all lanes, its own and the other hosts', and knows who reads
what. An epoch is dealt to its last document before the next one begins, so no document is ever two reads ahead of another.
"""

import tempfile
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from easylm_mling.config import MixerConfig
from easylm_mling.data.catalog import Source
from easylm_mling.data.documents import encode_documents, has_conversations, refused_records
from easylm_mling.data.mixture import BAD, BLOCK, DOCUMENT, DOCUMENTS, EPOCH, GOOD, OFFSET, PADDING, TOKENS, WINDOW
from easylm_mling.data.packing import LOOKAHEAD, choose_next, take
from easylm_mling.data.shuffle import EpochOrder, Part, seeded_order, unit_records
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.data.splits import choose
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError

# Sources of at most so many bytes (the catalog's) are pooled. A host tokenises them in a few seconds.
POOLED_BYTES = 16_000_000
_TEXT_AT_ONCE = 1_000_000


class Piece(NamedTuple):
    """A part of a document in a row: the document's number, the epoch it was dealt in, its first token here, and tokens."""

    document: int
    epoch: int
    first: int
    tokens: int


def is_pooled(source: Source) -> bool:
    """Return True if the source is small enough to be dealt by documents."""
    return int(source.units[:, 3].sum()) <= POOLED_BYTES


def lanes_with_data(config: MixerConfig, orders: list[EpochOrder]) -> list[int]:
    """Return, for each source, how many lanes can be given rows of it: the first ones."""
    return [config.lanes if is_pooled(o.source) else o.blocks_up_to(config.lanes) for o in orders]


def check_lanes_with_data(config: MixerConfig, orders: list[EpochOrder], lanes_with_data: list[int]):
    """Raise ConfigError for a source that would end the run before its first step."""
    for order, count in zip(orders, lanes_with_data, strict=True):
        name = order.source.name
        if count < config.lanes and config.data.sources[name].when_used_up == "stop":
            raise ConfigError(
                f"data.sources.{name}.when_used_up=stop: its max_epochs make only {count} blocks, fewer than the "
                f"{config.lanes} lanes, and the run would end at once; use redistribute, fewer data.lanes or a "
                "smaller data.block_bytes"
            )


class Pool:
    """One small source and all lanes' places in it.

    `counters`, int64 [V, C] (mixture.COUNTERS), says where the lanes are. EPOCH and WINDOW, alike in all lanes: the
    epoch that is dealt, and how many of its documents are. DOCUMENT: one more than the number of the document that the
    lane is in, or 0; OFFSET: the tokens of it that are consumed; BLOCK: the epoch it was dealt in. Of conversations no lane
    is in one, and OFFSET, alike in all lanes, says which of the next ones are dealt. Totals are kept for the
    host's `own` lanes only.
    `languages`, int64 [source's languages, 3], counts what own lanes have consumed since the pool was opened.
    """

    def __init__(
        self,
        order: EpochOrder,
        tokenizer: Tokenizer,
        counters: np.ndarray,
        own: range,
        on_bad: Callable[[list[BadRecord], int], None] = lambda bad, good: None,
    ):
        """Read and tokenise the source; `counters` are copied.

        `on_bad` is called with the bad records and the number of good ones of each unit, in the run's first epoch only,
        and only on the host of lane 0. Raises ConfigError if there is no document to train on.
        """
        self.counters, self.languages = counters.copy(), np.zeros((len(order.source.languages), 3), np.int64)
        self._order, self._tokenizer, self._own = order, tokenizer, own
        # The next document, shared by the lanes.
        self._epoch, self._dealt = int(counters[:, EPOCH].max()), int(counters[:, WINDOW].max())
        # Conversations are dealt whole, and not quite in order: which of the next ones are gone (packing.take).
        self._whole = has_conversations(order.source)
        self._taken = int(counters[:, OFFSET].max()) if self._whole else 0
        self._file = tempfile.TemporaryFile(prefix="easylm_mling_")
        is_first = 0 in own and (self._epoch, self._dealt) == (0, 0)
        try:
            self._read(on_bad if is_first else None)
        except BaseException:
            self.close()
            raise
        self._documents = lru_cache(maxsize=1)(self._order_documents)

    def close(self):
        """Drop the tokens."""
        self._file.close()

    def take(self, lane: int, count: int) -> list[Piece]:
        """Return the documents of a lane's next row of `count` tokens: fewer where the source ends in it, and then none."""
        pieces, state, left = [], self.counters[lane], count
        while self._whole and not self.is_used_up(lane):
            documents = self._documents(self._epoch)
            ends = np.cumsum([self.length(d) for d in documents[self._dealt : self._dealt + LOOKAHEAD].tolist()])
            if (chosen := choose_next(ends, 0, self._taken, left, not pieces)) is None:
                break
            document = int(documents[self._dealt + chosen])
            pieces.append(Piece(document, self._epoch, 0, self.length(document)))
            left -= self.length(document)
            gone, self._taken = take(0, self._taken, chosen)
            self._dealt += gone
        while not self._whole and left and not self.is_used_up(lane):
            if not state[DOCUMENT]:
                state[[BLOCK, DOCUMENT]] = self._epoch, int(self._documents(self._epoch)[self._dealt]) + 1
                self._dealt += 1
            document, first = int(state[DOCUMENT]) - 1, int(state[OFFSET])
            length = self.length(document)
            part = min(left, length - first)
            pieces.append(Piece(document, int(state[BLOCK]), first, part))
            left -= part
            state[OFFSET] = first + part
            if first + part == length:
                state[[DOCUMENT, OFFSET]] = 0
        if lane in self._own:
            self._count(state, pieces, left)
        return pieces

    def row(self, lane: int, count: int) -> np.ndarray:
        """Return the lane's next `count` tokens and the one after them, int32 [count + 1]; shorter at the source's end.

        A row of conversations is as long as they are, and has no token after it.
        """
        pieces = self.take(lane, count)
        parts = [self.tokens(p.document, p.first, p.tokens) for p in pieces]
        row = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        if len(row) < count or self._whole:
            return row
        document, offset = self.counters[lane, [DOCUMENT, OFFSET]].tolist()
        after = self.tokens(document - 1, offset, 1) if document else [self._tokenizer.bos_id]
        return np.append(row, np.array(after, np.int32))

    def is_used_up(self, lane: int) -> bool:
        """Return True if the lane's document is at its end and there is no next one (max_epochs)."""
        if self.counters[lane, DOCUMENT]:
            return False
        while self._epoch != self._order.epochs and self._dealt >= len(self._documents(self._epoch)):
            self._epoch, self._dealt = self._epoch + 1, 0
        return self._epoch == self._order.epochs

    def length(self, document: int) -> int:
        """Return a document's tokens, with BOS and EOS."""
        return int(self._ends[document] - (self._ends[document - 1] if document else 0))

    def tokens(self, document: int, first: int, count: int) -> np.ndarray:
        """Return tokens [first, first + count) of a document, int32."""
        begin = int(self._ends[document - 1]) if document else 0
        self._file.seek((begin + first) * 4)
        return np.frombuffer(self._file.read(count * 4), np.int32)

    def provenance(self, document: int) -> tuple[int, int]:
        """Return the document's unit, and its number among the unit's good documents."""
        return int(self._units[document]), int(self._ordinals[document])

    def write_to(self, counters: np.ndarray):
        """Write cursors and totals into `counters`, int64 [V, C]; those of the loader (rows, extra) are left alone."""
        self.counters[:, EPOCH], self.counters[:, WINDOW] = self._epoch, self._dealt
        if self._whole:
            self.counters[:, OFFSET] = self._taken
        columns = [EPOCH, BLOCK, WINDOW, DOCUMENT, OFFSET]
        counters[:, columns] = self.counters[:, columns]
        totals = [TOKENS, DOCUMENTS, BAD, GOOD, PADDING]
        own = slice(self._own.start, self._own.stop)
        counters[own, totals] = self.counters[own, totals]

    def _count(self, state: np.ndarray, pieces: list[Piece], left: int):
        state[TOKENS] += sum(p.tokens for p in pieces)
        state[PADDING] += left if pieces else 0
        for p in pieces:
            begun = int(p.first == 0)
            state[DOCUMENTS] += begun
            language = self._order.source.unit_languages[self._units[p.document]]
            self.languages[language, :2] += p.tokens, begun

    def _read(self, on_bad: Callable[[list[BadRecord], int], None] | None):
        lengths, units, ordinals = [], [], []
        source = self._order.source
        for unit in range(len(source.units)):
            texts, bad, good, waiting = [], [], 0, 0
            refused: dict[tuple[int, int], ValueError] = {}
            for record in unit_records(source, unit):
                if isinstance(record, BadRecord):
                    bad.append(record)
                    continue
                texts.append((good, record))
                good += 1
                waiting += len(record)
                if waiting > _TEXT_AT_ONCE:
                    refused |= self._add(texts, unit, lengths, units, ordinals)
                    texts, waiting = [], 0
            refused |= self._add(texts, unit, lengths, units, ordinals)
            if on_bad:
                records, bad_units = refused_records(source, refused, [Part(unit)])
                count, good = len(bad) + len(bad_units), good - len(refused)
                self.counters[0, [BAD, GOOD]] += count, good
                self.languages[source.unit_languages[unit], 2] += count
                on_bad(bad + records, good)
        self._ends = np.cumsum(np.array(lengths, np.int64))
        self._units, self._ordinals = np.array(units, np.int32), np.array(ordinals, np.int32)
        if not lengths:
            raise ConfigError(
                f"data.sources.{source.name}: a whole epoch holds no document to train on (all are bad or held out); "
                f"lower data.sources.{source.name}.holdout_fraction, or name other paths"
            )

    def _add(
        self, texts: list[tuple[int, bytes]], unit: int, lengths: list, units: list, ordinals: list
    ) -> dict[tuple[int, int], ValueError]:
        """Add the tokens of a unit's texts; returns (unit, number) -> reason of those that were refused."""
        chosen = [texts[i] for i in choose([text for _, text in texts], "train", self._order.source.settings)]
        encoded = encode_documents(self._order.source, self._tokenizer, [text for _, text in chosen])
        try:
            self._file.seek(0, 2)
            self._file.write(encoded.tokens.astype(np.int32).tobytes())
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"{tempfile.gettempdir()}: no room for the tokens of a small source ({error}); "
                "set TMPDIR to a folder on a larger disk"
            ) from error
        lengths += np.diff(encoded.ends, prepend=0).tolist()
        units += [unit] * len(encoded.kept)
        ordinals += [chosen[i][0] for i in encoded.kept]
        return {(unit, chosen[i][0]): reason for i, reason in encoded.refused.items()}

    def _order_documents(self, epoch: int) -> np.ndarray:
        """Return the documents of an epoch in the order in which they are dealt, int64 [n]."""
        documents = np.repeat(np.arange(len(self._ends)), self._order.copies(epoch)[self._units])
        return documents[seeded_order(len(documents), self._order.seed, self._order.source.name, "documents", epoch)]
