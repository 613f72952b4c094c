"""The endless token stream of one lane and source, and the spill file that keeps its text out of memory.

A host may hold a thousand streams, each in the middle of a window of megabytes. Their shuffled text waits in one
unlinked temporary file and is tokenised a row at a time: memory does not grow with the window, and a resume tokenises
no more than one row and a document of each stream.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

from easylm_mling.data.mixture import BAD, BLOCK, DOCUMENT, DOCUMENTS, EPOCH, OFFSET, PADDING, TOKENS, WINDOW
from easylm_mling.data.shuffle import EpochOrder, Window, epoch_windows, windows
from easylm_mling.data.token_cache import TokenCache, TokenWindow
from easylm_mling.data.tokenization.tokenizer import Tokenizer, join_documents
from easylm_mling.errors import ConfigError

# Blocks that take several windows are read by a generator that rests in between, with an open file. At most so many of
# them rest on one host; one that had to go is read again from its block's start.
_RESTING = 256
# Text tokenised at a time: about one row, at four bytes a token.
_BYTES_PER_TOKEN = 4


class SpillFile:
    """What the streams of one host share: their windows' text, and their resting readers."""

    def __init__(self):
        """The temporary file lies in TMPDIR, takes about 1.2 x block_bytes a stream, and cannot outlive the process."""
        self._file = tempfile.TemporaryFile(prefix="easylm_mling_")
        self._regions: dict[tuple, tuple[int, int]] = {}
        self._end = 0
        self._resting: OrderedDict[tuple, Iterator[Window]] = OrderedDict()

    def put_text(self, key: tuple, texts: list[bytes]):
        """Keep the texts of one window in place of the last one's."""
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
        self._file.seek(self._regions[key][0] + begin)
        return self._file.read(end - begin)

    def rest(self, key: tuple, reader: Iterator[Window]):
        self._resting[key] = reader
        if len(self._resting) > _RESTING:
            self._resting.popitem(last=False)

    def wake(self, key: tuple) -> Iterator[Window] | None:
        return self._resting.pop(key, None)

    def close(self):
        self._resting.clear()
        self._file.close()


class LaneStream:
    """Tokens of one source for one lane: of the source's blocks, counted on from epoch to epoch, every V-th."""

    def __init__(
        self,
        order: EpochOrder,
        tokenizer: Tokenizer,
        lane: int,
        lanes: int,
        counters: np.ndarray,
        languages: np.ndarray,
        spill_file: SpillFile,
        on_window: Callable[[Window], None],
        cache: TokenCache | None = None,
    ):
        """`counters`, int64 [C], is the cursor to start from, and is kept up to date in place.

        `languages`, int64 [source's languages, 3], is added to in place. `on_window` is called for each window when its
        first document is due: not again when a run resumes inside it.
        """
        self._languages = languages
        self._order, self._tokenizer, self._lanes, self._counters = order, tokenizer, lanes, counters
        self._key = (lane, order.source.name)
        self._shelf, self._on_window, self._cache = spill_file, on_window, cache
        # The open window if the cache had it; else its text is on the shelf.
        self._stored: TokenWindow | None = None
        # Where each document of the open window ends, in its tokens or its text. None: no window is open yet.
        self._ends: np.ndarray | None = None
        # The language of each, int16; of a source of one language, nothing is kept.
        self._language = np.zeros(0, np.int16)
        self._last = False
        self._buffer = np.zeros(0, np.int32)
        self._barren = 0

    def take(self, count: int) -> np.ndarray:
        """int32 [count + 1]: the next `count` tokens, and the one after them, which the next call gives again.

        Fewer than `count` if the source ends here (max_epochs), and none ever after. Raises ConfigError if the source
        has no document to train on.
        """
        row = np.empty(count + 1, np.int32)
        filled = 0
        while filled < count:
            if not len(self._buffer) and not self._fill(count):
                break
            part = self._buffer[: count - filled]
            self._buffer = self._buffer[len(part) :]
            row[filled : filled + len(part)] = part
            filled += len(part)
            self._consume(part)
        self._counters[TOKENS] += filled
        if filled < count:
            self._counters[PADDING] += count - filled if filled else 0
            return row[:filled]
        # The buffer holds whole documents, so where it ends a document begins, whichever it will be.
        row[count] = self._buffer[0] if len(self._buffer) else self._tokenizer.bos_id
        return row

    def _consume(self, tokens: np.ndarray):
        c, ends = self._counters, np.flatnonzero(tokens == self._tokenizer.eos_id)
        begun = np.count_nonzero(tokens == self._tokenizer.bos_id)
        if len(self._language):
            lengths = np.diff(ends, prepend=-1, append=len(tokens) - 1)
            lengths = lengths[lengths > 0]
            begins = np.ones(len(lengths), np.int64)
            begins[0] = c[OFFSET] == 0
            language = self._language[c[DOCUMENT] : c[DOCUMENT] + len(lengths)]
            np.add.at(self._languages[:, 0], language, lengths)
            np.add.at(self._languages[:, 1], language, begins)
        else:
            self._languages[0, :2] += len(tokens), begun
        c[DOCUMENTS] += begun
        c[DOCUMENT] += len(ends)
        c[OFFSET] = len(tokens) - 1 - ends[-1] if len(ends) else c[OFFSET] + len(tokens)

    def _fill(self, count: int) -> bool:
        """Tokenise the next documents, about `count` tokens, from the cursor on; False if there are none left."""
        while self._ends is None or self._counters[DOCUMENT] == len(self._ends):
            if not self._open_window():
                return False
        first, offset = int(self._counters[DOCUMENT]), int(self._counters[OFFSET])
        begin = int(self._ends[first - 1]) if first else 0
        reach = begin + (offset + count if self._stored else count * _BYTES_PER_TOKEN)
        ends = self._ends[first : int(np.searchsorted(self._ends, reach)) + 1].tolist()
        if self._stored:
            self._buffer = self._stored.tokens[begin + offset : ends[-1]]
            return True
        text = self._shelf.get_text(self._key, begin, ends[-1])
        texts = [text[a - begin : b - begin].decode() for a, b in zip([begin, *ends], ends, strict=False)]
        self._buffer = join_documents(self._tokenizer, texts)[offset:]
        return True

    def _open_window(self) -> bool:
        """Read the window at the cursor or, if one is open, the one after it; False at the end of all epochs."""
        c = self._counters
        if self._ends is not None:
            c[DOCUMENT] = 0
            c[WINDOW] += 1
            if self._last:
                c[WINDOW] = 0
                c[BLOCK] += self._lanes
            self._ends = None
        last = self._order.epochs
        while c[EPOCH] != last and c[BLOCK] >= (blocks := self._order.blocks(int(c[EPOCH]))):
            c[BLOCK] -= blocks
            c[EPOCH] += 1
        if c[EPOCH] == last:
            return False
        reader, place = self._shelf.wake(self._key), (int(c[EPOCH]), int(c[BLOCK]), int(c[WINDOW]))
        self._stored = self._cache.load(self._order, *place) if self._cache else None
        if self._stored:
            window, self._ends = self._stored.window, self._stored.ends
        else:
            reader = reader or windows(self._order, *place[:2], skip=place[2])
            window = next(reader)
            if not window.last:
                self._shelf.rest(self._key, reader)
            self._shelf.put_text(self._key, window.documents)
            self._ends = np.cumsum([len(text) for text in window.documents], dtype=np.uint32)
        if not c[DOCUMENT] and not c[OFFSET]:
            c[BAD] += len(window.bad)
            np.add.at(self._languages[:, 2], self._order.source.unit_languages[np.array(window.bad_units, np.int64)], 1)
            self._on_window(window)
        self._language = self._languages_of(window)
        self._last = window.last
        self._check_barren(len(self._ends), blocks)
        return True

    def _languages_of(self, window: Window) -> np.ndarray:
        source = self._order.source
        if len(source.languages) == 1:
            return self._language
        return source.unit_languages[window.provenance[:, 0]].astype(np.int16)

    def _check_barren(self, documents: int, blocks: int):
        """Raise ConfigError rather than look for ever, once an epoch's worth of windows in a row gave nothing."""
        self._barren = 0 if documents else self._barren + 1
        if self._barren <= blocks:
            return
        name = self._order.source.name
        if not any(w.documents for w in epoch_windows(self._order, 0, "train")):
            raise ConfigError(
                f"data.sources.{name}: a whole epoch holds no document to train on (all are bad or held out); "
                f"lower data.sources.{name}.holdout_fraction, or name other paths"
            )
        self._barren = 0
