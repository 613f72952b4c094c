"""The lines of a file, plain or compressed, in memory that grows with neither the file nor a line."""

import io
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from easylm_mling.storage.files import LOCAL_CHUNK, Retry, open_binary

# A longer line comes cut off just behind this, and is no record: nothing that was written as text is so long.
MAX_LINE_BYTES = 1 << 26
# Bytes read to measure how densely a file is packed: of the file, and of its text.
_SAMPLED_PACKED, _SAMPLED_TEXT = 1_000_000, 64_000_000
_UNPACKED_AT_ONCE = 1 << 16
# By the second part of a layout's name: pyarrow's name of the compression.
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}


def file_lines(path: str, layout: str, start: int, end: int, retry: Retry) -> Iterator[tuple[int, bytes]]:
    """Yield (offset in the text, line) of every line from the first that begins in [start, end) on; none if none does.

    A line keeps its newline. A compressed file is read from its start, whatever `start` and `end` are. Raises OSError
    if it is damaged or cut off, and EOFError if a plain one ends before `end`.
    """
    compression = _COMPRESSIONS.get(layout.partition(".")[2])
    if compression:
        start = end = 0
    with _open(path, compression, retry) as file:
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
            yield offset, line
            offset += length
        if offset < end:
            raise EOFError(f"it ends at byte {offset} and had {end}")


def unpacked_size(path: str, layout: str, size: int, retry: Retry) -> int:
    """Return the text of a packed file of `size` bytes, in bytes: exact for a small file, else from a sample of its start.

    A sample is 1 MB of the file, or 64 MB of text if that is less, and errs by a tenth at most where the file is alike
    throughout. Raises OSError for a damaged file.
    """
    with open_binary(path, retry) as file:
        stream: Any = pa.CompressedInputStream(pa.PythonFile(file, "r"), _COMPRESSIONS[layout.partition(".")[2]])
        text = packed = 0
        while part := len(stream.read(_UNPACKED_AT_ONCE)):
            if (read := file.tell()) != packed:
                # More of the file is read when the text of what was read before is all there.
                if packed >= _SAMPLED_PACKED or (packed and text >= _SAMPLED_TEXT):
                    return round(text * size / packed)
                packed = read
            text += part
            if text >= 4 * _SAMPLED_TEXT:
                return round(text * size / packed)
        return text


def _open(path: str, compression: str | None, retry: Retry) -> io.BufferedReader:
    file = open_binary(path, retry)
    if not compression:
        return file
    # Reads gzip members and zstd frames one after the other, and closes the file below it.
    stream: Any = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)
    return io.BufferedReader(stream, LOCAL_CHUNK)


def _rest_of_line(file: io.BufferedReader, limit: float = math.inf) -> int:
    """Skip through the next newline, or `limit` bytes or a little more; returns the bytes skipped."""
    skipped = 0
    while skipped < limit and (part := file.readline(LOCAL_CHUNK)):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped
