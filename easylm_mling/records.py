"""Append-only files of one JSON object a line, which a kill may cut short in the last one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import orjson


class Records:
    """Appends to the file `path`. A line is flushed at once: after a kill at most the last one is cut short."""

    def __init__(self, path: Path):
        cut_short = _cut_short(path)
        self._file = open(path, "a", encoding="utf-8")
        if cut_short:
            self._file.write("\n")

    def append(self, record: dict):
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


def read_records(path: Path) -> Iterator[dict]:
    """The objects in the order they were written, one at a time; nothing for lines that are none."""
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue  # the line that a kill cut short
            if isinstance(record, dict):
                yield record


def _cut_short(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
