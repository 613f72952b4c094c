"""The documents of one unit of a file, in the file's order and in bounded memory.

A unit is a range of *positions* of one file (see layouts.py): bytes of a JSONL file, row groups of a parquet file,
byte offsets of the messages of an Arrow stream, record batches of an Arrow file; a compressed JSONL file is a single
unit. A document belongs to the unit where it starts.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from easylm_mling.config import ConfigError

HEAD_BYTES = 200
_CHUNK_BYTES = 1 << 16
# Rows turned into Python objects at a time: web pages are a few KB each, so this is about a megabyte.
_ROWS = 256
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# What the libraries raise when a file is not what it should be.
DAMAGE = (pa.ArrowException, OSError, EOFError, zlib.error, zstandard.ZstdError)


class Bad(NamedTuple):
    """One record that cannot be used.

    `offset` is where it lies in `file`: the (decompressed) byte of a JSONL line, the row of a parquet or Arrow file,
    the byte of the record batch in an Arrow stream. `head` is the start of the record.
    """

    reason: str
    file: str
    offset: int
    head: bytes


def read_unit(path: str, layout: str, start: int, end: int, column: str, row: str) -> Iterator[bytes | Bad]:
    """Documents (valid UTF-8 without NUL, never blank) that start in [start, end), and the bad records on the way.

    With `row == "line"` rows are joined to documents by newlines, and a blank row ends one. Raises ConfigError, naming
    the file, if it is damaged or cut off.
    """
    rows = _rows(path, layout, start, column)
    try:
        if row == "line":
            yield from _join_lines(rows, end, skipping=start > 0)
            return
        for position, record in rows:
            if position >= end:
                return
            if isinstance(record, Bad) or record:
                yield record
    except DAMAGE as error:
        raise damaged(path, error) from error


def damaged(path: str, error: Exception) -> ConfigError:
    """The one-line error for a file whose bytes are not what its suffix promises."""
    detail = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"{path}: damaged or cut off ({detail[:200]}); replace the file, or take it out of the source's paths"
    )


def clean(text: str) -> bytes:
    """UTF-8 of `text` with NUL dropped and lone surrogates replaced by U+FFFD; empty if it is only white space."""
    if "\0" in text:
        text = text.replace("\0", "")
    if text.isspace():
        return b""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _LONE_SURROGATE.sub("\ufffd", text).encode()


def parse_json(line: bytes) -> Any:
    """The value of one JSON line; raises ValueError with a short reason.

    orjson refuses escaped lone surrogates, which web text holds; the standard parser takes them and has the last word.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("invalid JSON") from None


def json_lines(path: str, layout: str, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a JSONL file from the first line that begins at or after byte `start` of its text.

    Raises EOFError, zlib.error or ZstdError if a compressed file is damaged or cut off.
    """
    if layout == "jsonl":
        return _plain_lines(path, start)
    if layout == "jsonl.gz":
        return _compressed_lines(path, lambda: zlib.decompressobj(wbits=31))
    assert layout == "jsonl.zst", layout
    return _compressed_lines(path, lambda: zstandard.ZstdDecompressor().decompressobj())


def _join_lines(rows, end: int, skipping: bool) -> Iterator[bytes | Bad]:
    """Documents out of lines.

    A unit inside a file skips through its first blank row; the unit before it reads on through that same row. So
    neither has to look back, and every line is read by exactly one of them, even if units hold no blank row at all.
    """
    lines: list[bytes] = []
    for position, record in rows:
        if skipping:
            if position >= end:
                return
            skipping = isinstance(record, Bad) or bool(record)
        elif isinstance(record, Bad):
            yield record
        elif record:
            lines.append(record.removesuffix(b"\n"))
        else:
            if lines:
                yield b"\n".join(lines)
            if position >= end:
                return
            lines = []
    if lines:
        yield b"\n".join(lines)


def _rows(path: str, layout: str, start: int, column: str) -> Iterator[tuple[int, bytes | Bad]]:
    """(position, record) of every row from position `start` to the end of the *file*; a blank row is empty."""
    if layout == "parquet":
        return _parquet_rows(path, start, column)
    if layout == "arrow":
        return _arrow_rows(path, start, column)
    if layout == "arrow-file":
        return _arrow_file_rows(path, start, column)
    return _json_rows(path, layout, start, column)


def _json_rows(path, layout, start, column):
    splittable = layout == "jsonl"
    for offset, line in json_lines(path, layout, start):
        yield offset if splittable else 0, _json_record(path, offset, line, column)


def _json_record(path: str, offset: int, line: bytes, column: str) -> bytes | Bad:
    if offset == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if line.isspace():
        return b""
    try:
        value = parse_json(line)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        text = value.get(column)
        if not isinstance(text, str):
            found = "missing" if column not in value else f"{type(text).__name__}, not text"
            raise ValueError(f"field {column!r} is {found}")
    except ValueError as error:
        return Bad(str(error), path, offset, line.rstrip(b"\r\n")[:HEAD_BYTES])
    return clean(text)


def _plain_lines(path: str, start: int) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        offset = max(start - 1, 0)
        file.seek(offset)
        if start:
            # From one byte early: if that byte is a newline, the line at `start` is ours.
            offset += len(file.readline())
        for line in file:
            yield offset, line
            offset += len(line)


def _compressed_lines(path: str, decompressor: Callable[[], Any]) -> Iterator[tuple[int, bytes]]:
    begun, offset = [], 0
    for chunk in _decompress(path, decompressor):
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        for piece in rest:
            line = b"".join(begun)
            yield offset, line
            offset += len(line) + 1
            begun = [piece]
    if last := b"".join(begun):
        yield offset, last


def _decompress(path: str, decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """The text of a file of one or more gzip members or zstd frames; raises EOFError if the last one does not end."""
    member = None
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            while chunk:
                member = member or decompressor()
                yield member.decompress(chunk)
                if not member.eof:
                    break
                chunk, member = member.unused_data, None
    if member:
        raise EOFError("the compressed data ends too early")


def _parquet_rows(path, start, column):
    # Unbuffered reading would hold a whole column chunk of a row group, which may be hundreds of megabytes.
    with pq.ParquetFile(path, buffer_size=_CHUNK_BYTES, pre_buffer=False) as file:
        groups = range(file.num_row_groups)
        offset = sum(file.metadata.row_group(g).num_rows for g in groups[:start])
        for group in groups[start:]:
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
                yield from _column_rows(batch.column(0), path, column, group, range(offset, offset + len(batch)))
                offset += len(batch)


def _arrow_rows(path, start, column):
    with pa.memory_map(path) as source:
        schema = pa.ipc.read_schema(source)
        if start:
            source.seek(start)
        for position, message in arrow_messages(source):
            texts = pa.ipc.read_record_batch(message, schema).column(column)
            yield from _column_rows(texts, path, column, position, [position] * len(texts))


def arrow_messages(source: pa.MemoryMappedFile) -> Iterator[tuple[int, pa.Message]]:
    """(byte offset, message) of the record batches of an Arrow stream from where `source` stands, bodies untouched."""
    while True:
        position = source.tell()
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        if message.type != "record batch":
            raise pa.ArrowInvalid(f"a {message.type} message where a record batch should be")
        yield position, message


def _arrow_file_rows(path, start, column):
    with pa.memory_map(path) as source, pa.ipc.open_file(source) as file:
        offset = sum(file.get_batch(i).num_rows for i in range(start))
        for index in range(start, file.num_record_batches):
            texts = file.get_batch(index).column(column)
            yield from _column_rows(texts, path, column, index, range(offset, offset + len(texts)))
            offset += len(texts)


def _column_rows(texts: pa.Array, path: str, column: str, position: int, offsets):
    # As bytes: one row of invalid UTF-8 must not spoil the rows around it.
    values = texts.cast(pa.large_binary())
    for begin in range(0, len(values), _ROWS):
        for offset, value in zip(offsets[begin:], values.slice(begin, _ROWS).to_pylist(), strict=False):
            try:
                text = value.decode()
            except UnicodeDecodeError:
                yield position, Bad("invalid UTF-8", path, offset, value[:HEAD_BYTES])
            except AttributeError:
                yield position, Bad(f"column {column!r} is null", path, offset, b"")
            else:
                # Most text is clean, and then its bytes are already at hand.
                yield position, clean(text) if "\0" in text or text.isspace() else value
