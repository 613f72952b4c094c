"""The endless token stream of one lane and source.

Texts follow one another without a gap, and are tokenised a row at a time: a resume tokenises no more than one row and a
document of each stream. Conversations are put whole into rows (data/packing.py), and are tokenised when their window is
opened, for packing has to know their lengths.
"""

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from easylm_mling.data.documents import encode_window, has_conversations
from easylm_mling.data.mixture import COUNTERS
from easylm_mling.data.packing import choose_next, take
from easylm_mling.data.shuffle import EpochOrder, epoch_windows, windows
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.data.spill_file import SpillFile
from easylm_mling.data.token_cache import TokenCache, TokenWindow
from easylm_mling.data.tokenization.tokenizer import Tokenizer, document_ends, join_documents
from easylm_mling.errors import ConfigError

# Text tokenised at a time: about one row, at four bytes a token.
_BYTES_PER_TOKEN = 4


@dataclass(slots=True)
class StreamState:
    """What a lane has consumed of a source.

    The cursor: epoch, block, window of the block, document of the window, and token of the document (`offset`), or, of
    conversations, which of the next ones are gone (packing.take). Then totals: tokens, documents begun, bad and good
    records of the windows entered, and padding, in tokens.
    """

    epoch: int
    block: int
    window: int
    document: int
    offset: int
    tokens: int
    documents: int
    bad: int
    good: int
    padding: int

    @classmethod
    def from_counters(cls, counters: np.ndarray) -> "StreamState":
        """Take the state out of a lane's counters of a source, int64 [C] (mixture.COUNTERS)."""
        return cls(*counters[_STREAM_COUNTERS].tolist())

    def write_to(self, counters: np.ndarray):
        """Write the state into `counters`, int64 [C]; those of the loader (rows, extra) are left alone."""
        counters[_STREAM_COUNTERS] = _values(self)


_STREAM_COUNTERS = [COUNTERS.index(f.name) for f in fields(StreamState)]
_values = attrgetter(*(f.name for f in fields(StreamState)))


class EnteredWindow(NamedTuple):
    """A window whose first document has come: where it is, its bad records, and how many good ones were read for it.

    `bad_units` are the units of those that count; others are listed only.
    """

    epoch: int
    block: int
    window: int
    bad: list[BadRecord]
    bad_units: list[int]
    good: int


class LaneStream:
    """Tokens of one source for one lane: of the source's blocks, counted on from epoch to epoch, every V-th.

    `state` is what was consumed so far. `languages`, int64 [source's languages, 3] (mixture.LANGUAGE_COUNTERS), counts
    what this stream has consumed since it was opened.
    """

    def __init__(
        self,
        order: EpochOrder,
        tokenizer: Tokenizer,
        lane: int,
        lanes: int,
        state: StreamState,
        spill_file: SpillFile,
        cache: TokenCache | None = None,
    ):
        """Go on from `state`, which the stream owns from here on."""
        self.state = state
        self.languages = np.zeros((len(order.source.languages), 3), np.int64)
        self.entered: EnteredWindow | None = None
        self._order, self._tokenizer, self._lanes = order, tokenizer, lanes
        self._key = (lane, order.source.name)
        self._spill_file, self._cache = spill_file, cache
        # The open window if the cache has it; else its text is in the spill file.
        self._stored: TokenWindow | None = None
        # Where each document of the open window ends, in its tokens or its text. None: no window is open yet.
        self._ends: np.ndarray | None = None
        # The language of each document, int16; empty for a source of one language.
        self._language = np.zeros(0, np.int16)
        self._last = False
        # Tokens that follow the cursor, to the end of a document.
        self._buffer = np.zeros(0, np.int32)
        # The row under way, int32 [count + 1], and how many of its tokens are there.
        self._row, self._filled = np.zeros(0, np.int32), 0
        # Windows in a row that held no document.
        self._barren = 0
        self._whole = has_conversations(order.source)
        # Of conversations: the open window, until its first one is taken.
        self._to_enter: EnteredWindow | None = None

    def take(self, count: int) -> np.ndarray | None:
        """Return the next `count` tokens and the one after them, which the next call gives again: int32 [count + 1].

        None: a window was entered on the way, which is now `entered`; call again with the same count. A window is
        entered with its first token, so not again when a run resumes inside it. The row is shorter than `count` if the
        source ends in it (max_epochs), and empty ever after. A row of conversations is as long as they are, and has no
        token after it. Raises ConfigError if the source has no document to train on.
        """
        if self._whole:
            return self._take_whole(count)
        if not self._filled:
            self._row = np.empty(count + 1, np.int32)
        while self._filled < count:
            if not len(self._buffer):
                if self._ends is None or self.state.document == len(self._ends):
                    self._check_barren()
                    if not self._move_on():
                        break
                    if entered := self._open_window():
                        self._enter(entered)
                        return None
                    continue
                self._fill_buffer(count)
            part = self._buffer[: count - self._filled]
            self._buffer = self._buffer[len(part) :]
            self._row[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self._consume(part)
        row, filled, self._filled = self._row, self._filled, 0
        self.state.tokens += filled
        if filled < count:
            self.state.padding += count - filled if filled else 0
            return row[:filled]
        # The buffer holds whole documents, so where it ends a document begins, whichever it will be.
        row[count] = self._buffer[0] if len(self._buffer) else self._tokenizer.bos_id
        return row

    def _take_whole(self, count: int) -> np.ndarray | None:
        """Return whole conversations of at most `count` tokens, as `take` does."""
        state = self.state
        if not self._filled:
            self._row = np.empty(count, np.int32)
        while True:
            is_through = self._ends is None or state.document == len(self._ends)
            if is_through and not self._to_enter:
                self._check_barren()
                if not self._move_on():
                    break
                self._to_enter = self._open_window()
                continue
            chosen = None
            if not is_through:
                assert self._ends is not None
                room = count - self._filled
                chosen = choose_next(self._ends, state.document, state.offset, room, not self._filled)
                if chosen is None:
                    break
            if self._to_enter:
                # With its first conversation, or in passing if it has none: the cursor says which windows are counted.
                self._enter(self._to_enter)
                self._to_enter = None
                return None
            assert chosen is not None
            self._consume_whole(chosen)
        row, self._filled = self._row[: self._filled], 0
        state.tokens += len(row)
        state.padding += count - len(row) if len(row) else 0
        return row

    def _consume_whole(self, document: int):
        assert self._ends is not None
        begin, end = int(self._ends[document - 1]) if document else 0, int(self._ends[document])
        if self._stored:
            tokens = self._stored.tokens[begin:end]
        else:
            tokens = np.frombuffer(self._spill_file.get_text(self._key, begin * 4, end * 4), np.int32)
        self._row[self._filled : self._filled + len(tokens)] = tokens
        self._filled += len(tokens)
        language = int(self._language[document]) if len(self._language) else 0
        self.languages[language, :2] += len(tokens), 1
        self.state.documents += 1
        self.state.document, self.state.offset = take(self.state.document, self.state.offset, document)

    def _consume(self, tokens: np.ndarray):
        # The buffer holds whole documents: behind it, another begins.
        following = int(self._buffer[0]) if len(self._buffer) else None
        state, ends = self.state, document_ends(self._tokenizer, tokens, following) - 1
        begun = int(np.count_nonzero(tokens == self._tokenizer.bos_id))
        if len(self._language):
            lengths = np.diff(ends, prepend=-1, append=len(tokens) - 1)
            lengths = lengths[lengths > 0]
            begins = np.ones(len(lengths), np.int64)
            begins[0] = state.offset == 0
            language = self._language[state.document : state.document + len(lengths)]
            np.add.at(self.languages[:, 0], language, lengths)
            np.add.at(self.languages[:, 1], language, begins)
        else:
            self.languages[0, :2] += len(tokens), begun
        state.documents += begun
        state.document += len(ends)
        state.offset = len(tokens) - 1 - int(ends[-1]) if len(ends) else state.offset + len(tokens)

    def _fill_buffer(self, count: int):
        """Tokenise the open window's next documents, about `count` tokens, from the cursor on."""
        assert self._ends is not None
        first, offset = self.state.document, self.state.offset
        begin = int(self._ends[first - 1]) if first else 0
        reach = begin + (offset + count if self._stored else count * _BYTES_PER_TOKEN)
        ends = self._ends[first : int(np.searchsorted(self._ends, reach)) + 1].tolist()
        if self._stored:
            self._buffer = self._stored.tokens[begin + offset : ends[-1]]
            return
        text = self._spill_file.get_text(self._key, begin, ends[-1])
        texts = [text[a - begin : b - begin].decode() for a, b in zip([begin, *ends], ends, strict=False)]
        self._buffer = join_documents(self._tokenizer, texts)[offset:]

    def _move_on(self) -> bool:
        """Move the cursor to the window to open: the one it is at or, if that is open, the next; False at the end."""
        state, last = self.state, self._order.epochs
        if self._ends is not None:
            self._ends = None
            state.document = 0
            state.window += 1
            if self._last:
                state.window = 0
                state.block += self._lanes
        while state.epoch != last and state.block >= (blocks := self._order.blocks(state.epoch)):
            state.block -= blocks
            state.epoch += 1
        return state.epoch != last

    def _open_window(self) -> EnteredWindow | None:
        """Read the window at the cursor; returns it if its first document is to come, None on a resume inside it."""
        state = self.state
        reader, at = self._spill_file.take_reader(self._key), (state.epoch, state.block, state.window)
        self._stored = self._cache.load(self._order, *at) if self._cache else None
        if self._stored:
            window, self._ends = self._stored.window, self._stored.ends
        else:
            reader = reader or windows(self._order, state.epoch, state.block, skip=state.window)
            window = next(reader)
            if not window.last:
                self._spill_file.keep_reader(self._key, reader)
            if self._whole:
                tokens, self._ends, window = encode_window(
                    self._order, self._tokenizer, state.epoch, state.block, window
                )
                self._spill_file.put_text(self._key, [tokens.tobytes()])
            else:
                self._spill_file.put_text(self._key, window.documents)
                self._ends = np.cumsum([len(text) for text in window.documents], dtype=np.uint32)
        source = self._order.source
        if len(source.languages) > 1:
            self._language = source.unit_languages[window.provenance[:, 0]].astype(np.int16)
        self._last = window.last
        self._barren = 0 if len(self._ends) else self._barren + 1
        is_new = not state.document and not state.offset
        return EnteredWindow(*at, window.bad, window.bad_units, window.good) if is_new else None

    def _enter(self, window: EnteredWindow):
        """Count the records of a window whose first document comes now."""
        self.state.bad += len(window.bad_units)
        self.state.good += window.good
        units = np.array(window.bad_units, np.int64)
        np.add.at(self.languages[:, 2], self._order.source.unit_languages[units], 1)
        self.entered = window

    def _check_barren(self):
        """Raise ConfigError rather than search for ever, once an epoch's worth of windows in a row held nothing."""
        if not self._barren or self._barren <= self._order.blocks(self.state.epoch):
            return
        name = self._order.source.name
        if not any(w.documents for w in epoch_windows(self._order, 0, "train")):
            raise ConfigError(
                f"data.sources.{name}: a whole epoch holds no document to train on (all are bad or held out); "
                f"lower data.sources.{name}.holdout_fraction, or name other paths"
            )
        self._barren = 0
