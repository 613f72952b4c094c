"""Append-only files of one JSON object a line. A kill may cut the last line short, and readers allow for it."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

_MOST_WAITING = 64_000_000  # bytes that may wait for room on a full disk


class JsonlWriter:
    """Appends to the file `path`, from any thread. Each line is written at once, so a kill cuts at most the last one short.

    On a full disk lines wait in memory, without blocking, until a later line finds room. Letters beyond ASCII are escaped if
    `ascii_only`.
    """

    def __init__(self, path: Path, ascii_only: bool = True):
        self._path, self._ascii_only, self._lock = path, ascii_only, threading.Lock()
        self._waiting = bytearray(b"\n" if _cut_short(path) else b"")
        self._file: BinaryIO | None = None
        self._try_to_write()

    def append(self, record: dict):
        """Append one line. Raises OSError for any problem but a full disk, or if too much waits already."""
        line = json.dumps(record, ensure_ascii=self._ascii_only).encode(errors="backslashreplace") + b"\n"
        with self._lock:
            self._waiting += line
            self._try_to_write()

    def flush(self):
        """Bring all lines to disk. Raises OSError if there is no room for them."""
        with self._lock:
            os.fsync(self._write().fileno())

    def close(self):
        """Close the file. Raises OSError if lines still wait for room."""
        with self._lock:
            try:
                self._write()
            finally:
                if self._file:
                    self._file.close()

    def _try_to_write(self):
        try:
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(self._waiting) > _MOST_WAITING:
                raise

    def _write(self) -> BinaryIO:
        # Creating the file needs room too, so it waits with its lines.
        self._file = self._file or open(self._path, "ab", buffering=0)
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]
        return self._file


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yield the objects in the order they were written, without lines that are no object."""
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
