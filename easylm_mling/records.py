"""Append-only files of one JSON object a line, which a kill may cut short in the last one."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import orjson

# Bytes that may wait for room on a full disk.
_WAITING = 64_000_000


class Records:
    """Appends to the file `path`. A line is written at once: after a kill at most the last one is cut short.

    On a full disk lines wait for room, which is tried at every further line; nobody waits for them.
    """

    def __init__(self, path: Path):
        self._waiting = bytearray(b"\n" if _cut_short(path) else b"")
        self._file = open(path, "ab", buffering=0)

    def append(self, record: dict):
        """Raises OSError if it cannot be written for another reason than a full disk, or too much waits already."""
        self._waiting += json.dumps(record).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(self._waiting) > _WAITING:
                raise

    def close(self):
        """Raises OSError if lines still wait."""
        with self._file:
            self._write()

    def _write(self):
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]


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
