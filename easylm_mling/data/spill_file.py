"""The spill file that keeps the text of streams out of memory.

A host may hold a thousand streams, each in the middle of a window of megabytes. Their shuffled text, or the tokens of
their conversations, wait in one unlinked temporary file: memory does not grow with the window.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Iterator

from easylm_mling.data.shuffle import Window
from easylm_mling.errors import ConfigError

# Blocks of several windows are read by a generator that waits in between, with an open file. One host keeps at most
# this many; a block whose generator was dropped is read again from its start.
_WAITING_READERS = 256


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
