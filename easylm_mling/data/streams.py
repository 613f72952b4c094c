"""The endless token stream of one lane and source, and the spill file that keeps its text out of memory.

A host may hold a thousand streams, each in the middle of a window of megabytes. Their shuffled text waits in one
unlinked temporary file and is tokenised a row at a time: memory does not grow with the window, and a resume tokenises
no more than one row and a document of each stream.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from easylm_mling.data.mixture import COUNTERS
from easylm_mling.data.shuffle import EpochOrder, Window, epoch_windows, windows
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.data.token_cache import TokenCache, TokenWindow
from easylm_mling.data.tokenization.tokenizer import Tokenizer, document_ends, join_documents
from easylm_mling.errors import ConfigError

# Blocks of several windows are read by a generator that waits in between, with an open file. One host keeps at most
# this many; a block whose generator was dropped is read again from its start.
_WAITING_READERS = 256
# Text tokenised at a time: about one row, at four bytes a token.
_BYTES_PER_TOKEN = 4


@dataclass(slots=True)
class StreamState:
    """What a lane has consumed of a source.

    The cursor: epoch, block, window of the block, document of the window, and token of the document (`offset`). Then
    totals: tokens, documents begun, bad and good records of the windows entered, and padding, in tokens, of the stream's
    last row.
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
    """A window whose first document has come: where it is, its bad records, and how many good ones were read for it."""

    epoch: int
    block: int
    window: int
    bad: list[BadRecord]
    good: int


class SpillFile:
    """What the streams of one host share: their windows' text, and the readers that wait inside a block."""

    def __init__(self):
        """Open a file in TMPDIR, which takes about 1.2 x block_bytes a stream and cannot outlive the process."""
        self._file = tempfile.TemporaryFile(prefix="easylm_mling_")
        self._regions: dict[tuple, tuple[int, int]] = {}
        self._end = 0
        self._readers: OrderedDict[tuple, Iterator[Window]] = OrderedDict()

    def put_text(self, key: tuple, texts: list[bytes]):
        """Keep the texts of one window in place of the stream's last one; raises ConfigError on a full disk."""
        blob = b"".join(texts)
        start, room = self._regions.get(key, (0, 0))
        if len(blob) > room:
            start, room = self._end, len(blob)
            self._end += room
            self._regions[key] = (start, room)
        try:
            self._file.seek(start)
            self._file.write(blob)
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"{tempfile.gettempdir()}: no room for the text that waits to be tokenised ({error}); "
                "set TMPDIR to a folder on a larger disk"
            ) from error

    def get_text(self, key: tuple, begin: int, end: int) -> bytes:
        """Return bytes [begin, end) of the stream's window."""
        self._file.seek(self._regions[key][0] + begin)
        return self._file.read(end - begin)

    def keep_reader(self, key: tuple, reader: Iterator[Window]):
        """Keep the reader of the stream's block for its next window."""
        self._readers[key] = reader
        if len(self._readers) > _WAITING_READERS:
            self._readers.popitem(last=False)

    def take_reader(self, key: tuple) -> Iterator[Window] | None:
        """Return the reader that waits in the stream's block, if it is still kept."""
        return self._readers.pop(key, None)

    def close(self):
        """Drop the text and close the readers' files."""
        self._readers.clear()
        self._file.close()


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

    def take(self, count: int) -> np.ndarray | None:
        """Return the next `count` tokens and the one after them, which the next call gives again: int32 [count + 1].

        None: a window was entered on the way, which is now `entered`; call again with the same count. A window is
        entered with its first token, so not again when a run resumes inside it. The row is shorter than `count` if the
        source ends in it (max_epochs), and empty ever after. Raises ConfigError if the source has no document to train on.
        """
        if not self._filled:
            self._row = np.empty(count + 1, np.int32)
        while self._filled < count:
            if not len(self._buffer):
                if self._ends is None or self.state.document == len(self._ends):
                    self._check_barren()
                    if not self._move_on():
                        break
                    if self._open_window():
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

    def _open_window(self) -> bool:
        """Read the window at the cursor; True if its first document is to come, False on a resume inside it."""
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
            self._spill_file.put_text(self._key, window.documents)
            self._ends = np.cumsum([len(text) for text in window.documents], dtype=np.uint32)
        source = self._order.source
        if len(source.languages) > 1:
            self._language = source.unit_languages[window.provenance[:, 0]].astype(np.int16)
        self._last = window.last
        is_new = not state.document and not state.offset
        if is_new:
            state.bad += len(window.bad)
            state.good += window.good
            np.add.at(self.languages[:, 2], source.unit_languages[np.array(window.bad_units, np.int64)], 1)
            self.entered = EnteredWindow(*at, window.bad, window.good)
        self._barren = 0 if len(self._ends) else self._barren + 1
        return is_new

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
