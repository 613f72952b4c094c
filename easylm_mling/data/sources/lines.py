"""The lines of a file, plain or compressed, in memory that grows with neither the file nor a line."""

import bz2
import codecs
import gzip
import io
import lzma
import math
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from easylm_mling.storage.files import LOCAL_CHUNK, Retry, open_binary

# A longer line comes cut off just behind this, and is no record: nothing that was written as text is so long.
MAX_LINE_BYTES = 1 << 26
# What the libraries raise for a file that is not what its suffix says.
DAMAGE = (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError)
# To measure how densely a file is packed, so much of it is unpacked: less if it holds more text than this.
_SAMPLED_PACKED, _SAMPLED_TEXT = 1 << 22, 1 << 26
_FIRST_SAMPLE = 1 << 16
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


def unpacked_size(path: str, layout: str, size: int, retry: Retry) -> int:
    """Return the bytes of text in a packed file of `size` bytes: exact for a small one, else from a sample of its start.

    A sample is 4 MiB of the file, or less where that holds more than 64 MiB of text. It errs by a tenth at most where the
    file is alike throughout. Raises what the decompressors raise if a small file is damaged.
    """
    with open_binary(path, retry) as file:
        sample = file.read(_FIRST_SAMPLE)
        text = _unpacked(sample, layout, whole=len(sample) == size)
        if len(sample) < size:
            sample += file.read(min(_SAMPLED_PACKED, len(sample) * _SAMPLED_TEXT // max(1, text)) - len(sample))
            text = _unpacked(sample, layout, whole=len(sample) == size)
    return round(text * size / max(1, len(sample)))


def _unpacked(packed: bytes, layout: str, whole: bool) -> int:
    """Return the bytes of text in the start of a packed file, up to where it is cut off if it is not `whole`."""
    size = 0
    with _OPENERS[layout.partition(".")[2]](io.BytesIO(packed)) as file:
        try:
            while part := len(file.read(LOCAL_CHUNK)):
                size += part
        except DAMAGE:
            if whole:
                raise
    return size


def _rest_of_line(file: io.BufferedReader, limit: float = math.inf) -> int:
    """Skip through the next newline, or `limit` bytes or a little more; returns the bytes skipped."""
    skipped = 0
    while skipped < limit and (part := file.readline(LOCAL_CHUNK)):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped
