"""Append-only files of one JSON object a line. A kill may cut the last line short, and readers allow for it."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

# Bytes that may wait for room on a full disk.
_WAITING = 64_000_000


class JsonlWriter:
    """Appends to the file `path`, from any thread. A line is written at once: after a kill at most the last one is cut short.

    On a full disk lines wait for room, which is tried at every further line; nobody waits for them. Letters beyond ASCII
    are escaped, unless people are to read them (not `ascii_only`).
    """

    def __init__(self, path: Path, ascii_only: bool = True):
        self._path, self._ascii_only, self._lock = path, ascii_only, threading.Lock()
        self._waiting = bytearray(b"\n" if _cut_short(path) else b"")
        self._file: BinaryIO | None = None
        self._write_if_there_is_room()

    def append(self, record: dict):
        """Raises OSError if it cannot be written for another reason than a full disk, or too much waits already."""
        line = json.dumps(record, ensure_ascii=self._ascii_only).encode(errors="backslashreplace") + b"\n"
        with self._lock:
            self._waiting += line
            self._write_if_there_is_room()

    def flush(self):
        """All lines are on disk when it returns. Raises OSError if there is no room for them."""
        with self._lock:
            os.fsync(self._write().fileno())

    def close(self):
        """Raises OSError if lines still wait."""
        with self._lock:
            try:
                self._write()
            finally:
                if self._file:
                    self._file.close()

    def _write_if_there_is_room(self):
        try:
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(self._waiting) > _WAITING:
                raise

    def _write(self) -> BinaryIO:
        # Where a new file needs room, too, it waits as its lines do.
        self._file = self._file or open(self._path, "ab", buffering=0)
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]
        return self._file


def read_jsonl(path: Path) -> Iterator[dict]:
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
