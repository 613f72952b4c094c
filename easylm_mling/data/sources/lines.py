"""The lines of a file, plain or compressed, in memory that grows with neither the file nor a line."""

import bz2
import codecs
import gzip
import io
import lzma
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from easylm_mling.storage.files import LOCAL_CHUNK, Retry, open_binary

# A longer line comes cut off just behind this, and is no record: nothing that was written as text is so long.
MAX_LINE_BYTES = 1 << 26
# By the second part of a layout's name. All read members, streams and frames that follow one another as one.
_OPENERS: dict[str, Any] = {
    "gz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
    "zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}


def file_lines(path: str, layout: str, start: int, end: int, retry: Retry) -> Iterator[tuple[int, bytes]]:
    """Yield (offset in the text, line) of every line from the first that begins in [start, end) on; none if none does.

    A line keeps its newline, but no byte order mark: files that begin with one may be joined. A compressed file is read
    from its start, whatever `start` and `end` are. Raises what the decompressors raise if it is damaged or cut off, and
    EOFError if a plain one ends before `end`.
    """
    unpack = _OPENERS.get(layout.partition(".")[2])
    if unpack:
        start = end = 0
    with (
        open_binary(path, retry) as packed,
        io.BufferedReader(unpack(packed), LOCAL_CHUNK) if unpack else packed as file,
    ):
        offset = 0
        if start:
            # From one byte early: if that byte is a newline, the line at `start` is ours.
            offset = file.seek(start - 1)
            # No further than to the end: of the many units that lie in one endless line, each reads its own part.
            offset += _rest_of_line(file, end - offset)
            if offset >= end:
                return
        while line := file.readline(MAX_LINE_BYTES + 1):
            length = len(line)
            if length > MAX_LINE_BYTES and not line.endswith(b"\n"):
                length += _rest_of_line(file)
            yield offset, line.removeprefix(codecs.BOM_UTF8)
            offset += length
        if offset < end:
            raise EOFError(f"it ends at byte {offset} and had {end}")


def _rest_of_line(file: io.BufferedReader, limit: float = math.inf) -> int:
    """Skip through the next newline, or `limit` bytes or a little more; returns the bytes skipped."""
    skipped = 0
    while skipped < limit and (part := file.readline(LOCAL_CHUNK)):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped
