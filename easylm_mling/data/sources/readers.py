"""Read the documents of one unit of a file, in the file's order and in bounded memory.

A unit is a range of *positions* of one file (see data/sources/splitting.py): bytes of a file of lines, row groups of a
parquet file, byte offsets of an Arrow stream's messages, or record batches of an Arrow file. A compressed file of lines
is one unit. A document belongs to the unit in which it starts.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from easylm_mling.data.sources.columnar import ROWS, portions
from easylm_mling.data.sources.lines import DAMAGE, MAX_LINE_BYTES, file_lines
from easylm_mling.errors import ConfigError, one_line
from easylm_mling.storage.files import DEFAULT_RETRY, Retry

HEAD_BYTES = 200
_TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"
# Lines that are joined wait in memory. Where no blank one ends them, they are cut into documents of this size.
_MAX_JOINED_BYTES = 1 << 26
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRecord(NamedTuple):
    """A record that cannot be used.

    `offset` is its place in `file`: the byte of a line (after decompression), the row of a parquet or Arrow file, or the
    byte of the record batch in an Arrow stream. `head` is the record's first 200 bytes.
    """

    reason: str
    file: str
    offset: int
    head: bytes


def read_unit(
    path: str,
    layout: str,
    start: int,
    end: int,
    column: str,
    row: str,
    retry: Retry = DEFAULT_RETRY,
    holds: Callable[[int], bool] | None = None,
) -> Iterator[bytes | BadRecord]:
    """Yield the documents that start in [start, end), and the bad records between them.

    Documents are valid UTF-8 without NUL, and never blank. With `row == "line"` rows are joined to documents by
    newlines, and a blank row ends one. A row of a text file is a line. With `holds`, only the records are read whose
    number in the unit it returns True for; the others are passed over, of a file of lines without parsing them. Raises
    ConfigError, naming the file, if it is damaged, cut off or unreadable.
    """
    rows = _rows(path, layout, start, end, column, retry, None if row == "line" else holds)
    try:
        if row == "line":
            documents = _join_lines(rows, end, skipping=start > 0)
            yield from (document for i, document in enumerate(documents) if holds is None or holds(i))
            return
        for position, record in rows:
            if position >= end:
                return
            if isinstance(record, BadRecord) or record:
                yield record
    except DAMAGE as error:
        raise damaged(path, error) from error


def read_rows(
    path: str,
    layout: str,
    start: int,
    end: int,
    columns: Sequence[str],
    retry: Retry = DEFAULT_RETRY,
    holds: Callable[[int], bool] | None = None,
) -> Iterator[tuple[int, bytes, dict[str, Any]] | BadRecord]:
    """Yield (offset, head, row) for the rows that start in [start, end), and the bad records between them.

    Offset and head: see BadRecord. A row is what is in its `columns`, as Python's own values; of JSON the whole object.
    With `holds`, only the rows are parsed whose number in the unit, blank lines not counted, it returns True for. Raises
    ConfigError, naming the file, if it is damaged, cut off or unreadable.
    """
    numbers = count()
    try:
        if layout.startswith("jsonl"):
            for offset, line in file_lines(path, layout, start, end, retry):
                if "." not in layout and offset >= end:
                    return
                if line and not line.isspace() and (holds is None or holds(next(numbers))):
                    yield _json_row(path, offset, line)
            return
        for position, table, offset_of in portions(path, layout, start, columns, retry):
            if position >= end:
                return
            for i in range(len(table)):
                if holds is None or holds(next(numbers)):
                    yield _table_row(path, offset_of(i), table.slice(i, 1))
    except DAMAGE as error:
        raise damaged(path, error) from error


def _json_row(path: str, offset: int, line: bytes) -> tuple[int, bytes, dict[str, Any]] | BadRecord:
    head = line.rstrip(b"\r\n")[:HEAD_BYTES]
    try:
        return offset, head, _json_object(line)
    except ValueError as error:
        return BadRecord(str(error), path, offset, head)


def _json_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"line {_TOO_LONG}")
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _table_row(path: str, offset: int, row: pa.RecordBatch) -> tuple[int, bytes, dict[str, Any]] | BadRecord:
    """`row` has one row: one of invalid UTF-8 must not spoil the rows around it."""
    try:
        values = row.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecord("invalid UTF-8", path, offset, b"")
    return offset, repr(values)[:HEAD_BYTES].encode(errors="replace")[:HEAD_BYTES], values


def damaged(path: str, error: Exception) -> ConfigError:
    """Return the error, of one line, for a file whose bytes are not what its suffix says."""
    if "too much memory" in str(error):
        return ConfigError(
            f"{path}: was compressed with a window of more than 128 MiB (zstd --long), which every lane would hold in memory; "
            "compress it without that option"
        )
    return ConfigError(
        f"{path}: damaged or cut off ({one_line(error)}); replace the file, or take it out of the source's paths"
    )


def clean(text: str) -> bytes:
    """Return `text` in UTF-8, without NUL and with U+FFFD for lone surrogates; empty if it is white space only."""
    if "\0" in text:
        text = text.replace("\0", "")
    if text.isspace():
        return b""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _LONE_SURROGATE.sub("\ufffd", text).encode()


def parse_json(line: bytes) -> Any:
    """Return the value of one JSON line; raises ValueError with a short reason.

    orjson refuses escaped lone surrogates, which web text holds. What it refuses, the standard parser decides.
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
        pass
    try:
        json.loads(line.decode(), strict=False)
    except (ValueError, RecursionError):
        raise ValueError("invalid JSON") from None
    raise ValueError("raw control character in JSON")


def _join_lines(rows, end: int, skipping: bool) -> Iterator[bytes | BadRecord]:
    """Yield documents made of lines.

    A unit inside a file skips through its first blank row, and the unit before it reads on through that row. So neither
    has to look back, and every line is of exactly one unit, even where units have no blank row.
    """
    lines: list[bytes] = []
    size = 0
    for position, record in rows:
        if skipping:
            if position >= end:
                return
            skipping = isinstance(record, BadRecord) or bool(record)
        elif isinstance(record, BadRecord):
            yield record
        elif record:
            lines.append(record.removesuffix(b"\n"))
            size += len(record) + 1
            if size > _MAX_JOINED_BYTES:
                yield b"\n".join(lines)
                lines, size = [], 0
        else:
            if lines:
                yield b"\n".join(lines)
            if position >= end:
                return
            lines, size = [], 0
    if lines:
        yield b"\n".join(lines)


def _rows(
    path: str, layout: str, start: int, end: int, column: str, retry: Retry, holds: Callable[[int], bool] | None
) -> Iterator[tuple[int, bytes | BadRecord]]:
    """Yield (position, record) of every row from position `start` to the end of the *file*.

    A blank row is empty, and so is one whose number, counted from 0 at `start`, `holds` returns False for.

    Nothing is yielded of a file of lines if no line begins in [start, end).
    """
    if layout.startswith(("jsonl", "text")):
        record_of = _json_record if layout.startswith("jsonl") else _text_record
        splittable = "." not in layout
        for number, (offset, line) in enumerate(file_lines(path, layout, start, end, retry)):
            record = record_of(path, offset, line, column) if holds is None or holds(number) else b""
            yield offset if splittable else 0, record
        return
    number = -1
    for position, table, offset_of in portions(path, layout, start, [column], retry):
        # As bytes: one row of invalid UTF-8 must not spoil the rows around it.
        values = table.column(0).cast(pa.large_binary())
        for begin in range(0, len(values), ROWS):
            for i, value in enumerate(values.slice(begin, ROWS).to_pylist(), begin):
                number += 1
                is_held = holds is None or holds(number)
                yield position, _table_record(path, offset_of, i, value, column) if is_held else b""


def _json_record(path: str, offset: int, line: bytes, column: str) -> bytes | BadRecord:
    if not line or line.isspace():
        return b""
    try:
        value = _json_object(line)
        text = value.get(column)
        if not isinstance(text, str):
            problem = "missing" if column not in value else f"{type(text).__name__}, not text"
            raise ValueError(f"field {column!r} is {problem}")
    except ValueError as error:
        return BadRecord(str(error), path, offset, line.rstrip(b"\r\n")[:HEAD_BYTES])
    return clean(text)


def _text_record(path: str, offset: int, line: bytes, _column: str) -> bytes | BadRecord:
    line = line.rstrip(b"\r\n")
    if len(line) > MAX_LINE_BYTES:
        return BadRecord(f"line {_TOO_LONG}", path, offset, line[:HEAD_BYTES])
    try:
        return clean(line.decode())
    except UnicodeDecodeError:
        return BadRecord("invalid UTF-8", path, offset, line[:HEAD_BYTES])


def _table_record(
    path: str, offset_of: Callable[[int], int], i: int, value: bytes | None, column: str
) -> bytes | BadRecord:
    if value is None:
        return BadRecord(f"column {column!r} is null", path, offset_of(i), b"")
    if len(value) > MAX_LINE_BYTES:
        return BadRecord(f"text {_TOO_LONG}", path, offset_of(i), value[:HEAD_BYTES])
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return BadRecord("invalid UTF-8", path, offset_of(i), value[:HEAD_BYTES])
    # Most text is clean: then its bytes are used as they are.
    return clean(text) if "\0" in text or text.isspace() else value
