"""The lines of a file, plain or compressed, in memory that grows with neither the file nor a line."""

import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from easylm_mling.storage.files import LOCAL_CHUNK, Retry, open_binary

# A longer line comes cut off just behind this, and is no record: nothing that was written as text is so long.
MAX_LINE_BYTES = 1 << 26
# Unpacked at a time: text that repeats itself grows a thousandfold.
_PACKED_CHUNK = 1 << 12


def file_lines(path: str, layout: str, start: int, end: int, retry: Retry) -> Iterator[tuple[int, bytes]]:
    """(offset in the text, line) of every line of a file from the first that begins in [start, end) on; none if none does.

    For a compressed layout start and end mean nothing. A line keeps its newline, except in compressed files. Raises EOFError,
    zlib.error or ZstdError if a compressed file is damaged or cut off, and EOFError if a plain one ends before `end`.
    """
    if layout.endswith(".gz"):
        return _compressed_lines(path, lambda: zlib.decompressobj(wbits=31), retry)
    if layout.endswith(".zst"):
        return _compressed_lines(path, lambda: zstandard.ZstdDecompressor().decompressobj(), retry)
    return _plain_lines(path, start, end, retry)


def _plain_lines(path: str, start: int, end: int, retry: Retry) -> Iterator[tuple[int, bytes]]:
    with open_binary(path, retry) as file:
        # From one byte early: if that byte is a newline, the line at `start` is ours.
        offset = file.seek(max(start - 1, 0))
        if start:
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


def _rest_of_line(file, limit: float = math.inf) -> int:
    """Skip through the next newline, or `limit` bytes or a little more; returns the bytes skipped."""
    skipped = 0
    while skipped < limit and (part := file.readline(LOCAL_CHUNK)):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _compressed_lines(path: str, decompressor: Callable[[], Any], retry: Retry) -> Iterator[tuple[int, bytes]]:
    begun, length, offset = [], 0, 0
    for chunk in _decompress(path, decompressor, retry):
        first, *rest = chunk.split(b"\n")
        if length <= MAX_LINE_BYTES:
            begun.append(first)
        length += len(first)
        for piece in rest:
            yield offset, b"".join(begun)[: MAX_LINE_BYTES + 1]
            offset += length + 1
            begun, length = [piece], len(piece)
    if length:
        yield offset, b"".join(begun)[: MAX_LINE_BYTES + 1]


def _decompress(path: str, decompressor: Callable[[], Any], retry: Retry) -> Iterator[bytes]:
    """The text of a file of one or more gzip members or zstd frames; raises EOFError if the last one does not end."""
    member = None
    with open_binary(path, retry) as file:
        while chunk := file.read(_PACKED_CHUNK):
            while chunk:
                member = member or decompressor()
                yield member.decompress(chunk)
                if not member.eof:
                    break
                chunk, member = member.unused_data, None
    if member:
        raise EOFError("the compressed data ends too early")
