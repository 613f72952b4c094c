"""Each file format from outside: its layout's name, the units it can be cut into, and a check that it has the text.

No file's body is read, but a sample of a packed one to measure its text: parquet and Arrow have footers or message
headers, and lines are cut by arithmetic.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa

from easylm_mling.data.sources.columnar import HEADER_CHUNK, arrow_heads, chunk_bytes, open_parquet
from easylm_mling.data.sources.lines import file_lines, unpacked_size
from easylm_mling.data.sources.readers import parse_json
from easylm_mling.errors import ConfigError
from easylm_mling.storage.files import DEFAULT_RETRY, Retry, is_remote, open_arrow, open_binary

# The first part of a layout's name is its format, the second how it is compressed.
_PACKED = {"": "", ".gz": ".gz", ".zst": ".zst", ".zstd": ".zst", ".xz": ".xz", ".bz2": ".bz2"}
_LINES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text"}
_SUFFIXES = {
    **{".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"},
    **{suffix + packed: kind + how for suffix, kind in _LINES.items() for packed, how in _PACKED.items()},
}
KNOWN_SUFFIXES = f".parquet, .arrow, .feather, and {', '.join(_LINES)}, each also with {', '.join([*_PACKED][1:])}"
# The text field is looked for in so many rows that parse, among so many lines.
_HEAD_ROWS = 100
_HEAD_LINES = 10_000
# Columns of no type come from tables in which every value is null: their rows are bad records, as nulls elsewhere.
_TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.null())
# A local file is mapped, but of a remote one a record batch is held in memory.
_MAX_REMOTE_BATCH_BYTES = 1 << 28

# (first position, position after the last, estimated bytes of text). Positions: see data/sources/readers.py.
Cut = tuple[int, int, int]


def format_of(path: str) -> str | None:
    """Return jsonl, text, parquet or arrow, by suffix in any case; None for an unknown suffix."""
    layout = _by_suffix(path)
    return layout and layout.split(".")[0]


def layout_of(path: str, retry: Retry = DEFAULT_RETRY) -> str:
    """Return the layout's name, by suffix and, for Arrow, magic bytes; raises ConfigError for an unknown suffix."""
    layout = _by_suffix(path)
    if layout is None:
        raise ConfigError(f"{path}: unknown file format; known are {KNOWN_SUFFIXES}")
    return "arrow-file" if layout == "arrow" and _is_arrow_file(path, retry) else layout


def cut(
    path: str,
    layout: str,
    size: int,
    columns: Sequence[str],
    unit_bytes: int,
    retry: Retry = DEFAULT_RETRY,
    setting: str = "text_column",
) -> list[Cut]:
    """Return the units of a file in order, each of about `unit_bytes` of text where the format allows it.

    The first of `columns` must be in the file, and is named by the source's `setting`; a text_column must hold text.
    Raises ConfigError, naming the file, if it has no such text column, and one of readers.DAMAGE if it is damaged.
    """
    if size == 0:
        return []
    if layout == "parquet":
        pieces = _parquet_pieces(path, columns, setting, retry)
    elif layout == "arrow":
        pieces = _arrow_pieces(path, columns[0], setting, retry)
    elif layout == "arrow-file":
        pieces = _arrow_file_pieces(path, columns[0], setting, size, retry)
    else:
        if layout.startswith("jsonl"):
            _check_json_field(path, layout, columns[0], setting, retry)
        elif setting != "text_column":
            raise ConfigError(f"{path}: a text file holds no conversations; name .jsonl, .parquet or .arrow files")
        if "." in layout:
            # An empty text still is a unit: a reader tells what is wrong with it.
            return [(0, 1, max(1, unpacked_size(path, layout, size, retry)))]
        return [(a, min(a + unit_bytes, size), min(unit_bytes, size - a)) for a in range(0, size, unit_bytes)]
    return _merge(pieces, unit_bytes)


def _by_suffix(path: str) -> str | None:
    return next((layout for suffix, layout in _SUFFIXES.items() if path.lower().endswith(suffix)), None)


def _merge(pieces: list[Cut], unit_bytes: int) -> list[Cut]:
    """Join neighbours until they reach `unit_bytes`. The first unit starts at 0, which marks a file's start."""
    units, begin, total = [], 0, 0
    for _, end, size in pieces:
        total += size
        if total >= unit_bytes:
            units.append((begin, end, total))
            begin, total = end, 0
    return [*units, (begin, pieces[-1][1], total)] if total else units


def _parquet_pieces(path, columns, setting, retry):
    with open_binary(path, retry) as binary, open_parquet(binary) as file:
        _check_column(path, file.schema_arrow, columns[0], setting)
        groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        # A column that is null throughout takes no bytes, and its rows are bad records.
        return [(i, i + 1, max(1, chunk_bytes(file, i, columns))) for i, g in enumerate(groups) if g.num_rows]


def _arrow_pieces(path, column, setting, retry):
    with open_arrow(path, retry, HEADER_CHUNK) as source:
        schema = pa.ipc.read_schema(source)
        _check_column(path, schema, column, setting)
        encoded = [field.name for field in schema if pa.types.is_dictionary(field.type)]
        if encoded:
            raise ConfigError(f"{path}: column {encoded[0]!r} is dictionary-encoded; write the file with plain columns")
        heads = list(arrow_heads(source))
        if source.read(HEADER_CHUNK).strip(b"\0"):
            raise ConfigError(f"{path}: another Arrow stream follows the first in it; make each a file of its own")
    _check_batch(path, max((body for *_, body in heads), default=0))
    return [(begin, end, body) for begin, end, _, body in heads]


def _arrow_file_pieces(path, column, setting, size, retry):
    with open_arrow(path, retry) as source, pa.ipc.open_file(source) as file:
        _check_column(path, file.schema, column, setting)
        count = file.num_record_batches
        _check_batch(path, size // max(1, count))
        return [(i, i + 1, max(1, size // count)) for i in range(count)]


def _check_batch(path: str, size: int):
    if is_remote(path) and size > _MAX_REMOTE_BATCH_BYTES:
        raise ConfigError(
            f"{path}: a record batch of {size >> 20} MiB would be held in memory; copy the file to a local disk, or "
            "write it as parquet"
        )


def _is_arrow_file(path: str, retry: Retry) -> bool:
    with open_binary(path, retry, chunk=6) as file:
        return file.read(6) == b"ARROW1"


def _check_column(path: str, schema: pa.Schema, column: str, setting: str):
    names = ", ".join(schema.names)
    if column not in schema.names:
        raise ConfigError(f"{path}: no column {column!r}; set {setting} to one of: {names}")
    if schema.names.count(column) > 1:
        raise ConfigError(
            f"{path}: it has {schema.names.count(column)} columns {column!r}; give each a name of its own"
        )
    kind = schema.field(column).type
    if setting == "text_column" and kind not in _TEXT_TYPES:
        raise ConfigError(f"{path}: column {column!r} is {kind}, not text; set text_column to another of: {names}")


def _check_json_field(path: str, layout: str, column: str, setting: str, retry: Retry):
    """Raise ConfigError if none of the first rows that parse has the field: then its name is wrong, not the rows."""
    seen: dict[str, None] = {}
    parsed, lines = 0, 0
    for _, line in islice(file_lines(path, layout, 0, 0, retry), _HEAD_LINES):
        lines += bool(line.strip())
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
        names = ", ".join(list(seen)[:20])
        raise ConfigError(f"{path}: no field {column!r} in its first {parsed} rows; set {setting} to one of: {names}")
    if lines and ".json" in Path(path).suffixes:
        raise ConfigError(f"{path}: no line of it is a JSON object; write one object a line (jq -c '.[]' does it)")
