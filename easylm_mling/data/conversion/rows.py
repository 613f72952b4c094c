"""Rows of jsonl, csv, tsv, parquet and Arrow files, one at a time, and the fields in them."""

import csv
import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from easylm_mling.config.paths import expanded
from easylm_mling.data.sources.readers import BadRecord, read_rows
from easylm_mling.data.sources.splitting import layout_of
from easylm_mling.errors import ConfigError, check, one_line

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_FOREVER = 1 << 62


def find(key: str, patterns: Sequence[str]) -> list[Path]:
    """Return the files that match, sorted, each once. Raises ConfigError for a pattern without one."""
    paths: set[Path] = set()
    for pattern in patterns:
        matched = [Path(p) for p in glob.glob(str(expanded(pattern)), recursive=True) if Path(p).is_file()]
        check(bool(matched), f"{key}: {pattern!r} matches no file; correct it (it is relative to {Path.cwd()})")
        paths.update(matched)
    return sorted(paths)


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (number from 1, row) of a file's rows, None for one that cannot be read.

    Raises ConfigError, naming the file, if it is damaged or of no known format.
    """
    delimiter = _DELIMITERS.get(path.suffix.lower())
    if delimiter:
        yield from enumerate(_csv_rows(path, delimiter), 1)
        return
    layout = layout_of(str(path))
    check(not layout.startswith("text"), f"{path}: has no fields; name .jsonl, .csv, .tsv, .parquet or .arrow files")
    end = path.stat().st_size if layout == "jsonl" else _FOREVER
    names = () if layout.startswith("jsonl") else _columns(path, layout)
    for number, item in enumerate(read_rows(str(path), layout, 0, end, names), 1):
        yield number, None if isinstance(item, BadRecord) else item[2]


def value_at(row: Any, key: str) -> Any:
    """Return what is at `key`, `a.b` being b inside a, and of a list the first; KeyError if there is no such key."""
    value = row
    for part in [key] if isinstance(row, dict) and key in row else key.split("."):
        while isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, dict):
            # A null, or an empty list, has no text; what is a text already has nothing inside.
            if value is None or value == []:
                return None
            raise KeyError(key)
        value = value[part]
    return value[0] if isinstance(value, list) and value else value


def text_of(value: Any) -> str:
    """Return a value as text without space around it; empty for none, for a list and for an object."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # columns of whole numbers with nulls come as floats
    return str(value).strip() if isinstance(value, (str, int, float)) else ""


def sha256_of(path: Path) -> str:
    """Return the digest of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, Any] | None]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # None: more values than the heading has names, or fewer.
            for row in csv.DictReader(file, delimiter=delimiter, strict=True):
                yield None if None in row or None in row.values() else row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not readable as {path.suffix[1:]} in UTF-8 ({one_line(error)})") from error


def _columns(path: Path, layout: str) -> list[str]:
    if layout == "parquet":
        return pq.read_schema(path).names
    with pa.memory_map(str(path)) as source:
        return (pa.ipc.open_stream if layout == "arrow" else pa.ipc.open_file)(source).schema.names
