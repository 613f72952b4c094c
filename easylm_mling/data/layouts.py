"""What each file format looks like from outside: its name, the units it can be cut into, and whether it has the text.

Nothing here reads a file's body: parquet and Arrow have footers or message headers, JSONL is cut by arithmetic.
"""

from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from easylm_mling.config import ConfigError
from easylm_mling.data.readers import arrow_messages, json_lines, parse_json

_SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".arrow": "arrow",
}
# Web text shrinks to about a third; only the sizes of blocks, not their content, hang on this guess.
_COMPRESSION = 3
# How far to look for the text field: so many rows that parse, among so many lines.
_HEAD_ROWS = 100
_HEAD_LINES = 10_000
_TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view())

# (first position, position after the last, estimated bytes of text): see readers.py for what a position is.
Cut = tuple[int, int, int]


def layout_of(path: str) -> str:
    """The layout's name, by suffix (and, for `.arrow`, by magic bytes); raises ConfigError for an unknown suffix."""
    for suffix, layout in _SUFFIXES.items():
        if path.endswith(suffix):
            return "arrow-file" if layout == "arrow" and _is_arrow_file(path) else layout
    raise ConfigError(f"{path}: unknown file format; known suffixes are {', '.join(_SUFFIXES)}")


def cut(path: str, layout: str, size: int, column: str, unit_bytes: int) -> list[Cut]:
    """The units of a file, in order, each of about `unit_bytes` of text where the format allows it.

    Raises ConfigError, naming the file, if the text column is not there. Damage raises what readers.damaged wraps.
    """
    if size == 0:
        return []
    if layout == "parquet":
        pieces = _parquet_pieces(path, column)
    elif layout == "arrow":
        pieces = _arrow_pieces(path, column)
    elif layout == "arrow-file":
        pieces = _arrow_file_pieces(path, column, size)
    else:
        _check_json_field(path, layout, column)
        if layout != "jsonl":
            return [(0, 1, size * _COMPRESSION)]
        return [(a, min(a + unit_bytes, size), min(unit_bytes, size - a)) for a in range(0, size, unit_bytes)]
    return _merge(pieces, unit_bytes)


def _merge(pieces: list[Cut], unit_bytes: int) -> list[Cut]:
    """Neighbours joined until they reach `unit_bytes`. The first unit starts at 0, the mark of a file's start."""
    units, begin, total = [], 0, 0
    for _, end, size in pieces:
        total += size
        if total >= unit_bytes:
            units.append((begin, end, total))
            begin, total = end, 0
    return [*units, (begin, pieces[-1][1], total)] if total else units


def _parquet_pieces(path, column):
    with pq.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow, column)
        groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        leaf = [c.path for c in file.metadata.schema].index(column)
        return [(i, i + 1, g.column(leaf).total_uncompressed_size) for i, g in enumerate(groups) if g.num_rows]


def _arrow_pieces(path, column):
    with pa.memory_map(path) as source:
        schema = pa.ipc.read_schema(source)
        _check_column(path, schema, column)
        encoded = [field.name for field in schema if pa.types.is_dictionary(field.type)]
        if encoded:
            raise ConfigError(f"{path}: column {encoded[0]!r} is dictionary-encoded; write the file with plain columns")
        return [(position, source.tell(), message.body.size) for position, message in arrow_messages(source)]


def _arrow_file_pieces(path, column, size):
    with pa.memory_map(path) as source, pa.ipc.open_file(source) as file:
        _check_column(path, file.schema, column)
        count = file.num_record_batches
        return [(i, i + 1, max(1, size // count)) for i in range(count)]


def _is_arrow_file(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(6) == b"ARROW1"


def _check_column(path: str, schema: pa.Schema, column: str):
    there = ", ".join(schema.names)
    if column not in schema.names:
        raise ConfigError(f"{path}: no column {column!r}; set text_column to one of: {there}")
    kind = schema.field(column).type
    if kind not in _TEXT_TYPES:
        raise ConfigError(f"{path}: column {column!r} is {kind}, not text; set text_column to another of: {there}")


def _check_json_field(path: str, layout: str, column: str):
    """Raises ConfigError if none of the first rows that parse has the field: no bad record but a misspelling."""
    seen: dict[str, None] = {}
    parsed = 0
    for _, line in islice(json_lines(path, layout), _HEAD_LINES):
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            if column in value:
                return
            seen.update(dict.fromkeys(map(str, value)))
            parsed += 1
        if parsed == _HEAD_ROWS:
            break
    if parsed:
        there = ", ".join(list(seen)[:20])
        raise ConfigError(f"{path}: no field {column!r} in its first {parsed} rows; set text_column to one of: {there}")
