"""A lease on a run directory where storage has no locks: an object that its owner rewrites every few seconds.

It is only ever written on condition that it is still the one that was read before, which a bucket decides. Who finds
another's lease watches it by his own clock, for clocks differ: if nothing is written in STALE_SECONDS the owner is dead
or out of reach, and the lease is taken over. Of a process of this very machine it is known at once.
"""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import tensorstore as ts

from easylm_mling.errors import STOPPED, STUCK, ConfigError, one_line

NAME = "lease"
LOCK = ".__lock"  # how tensorstore ends the name of a file's lock
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
# Without an answer for so long, one beat has failed.
_ANSWER_SECONDS = 20.0
# A write's lock file that is as old as this is a dead process's: a write takes milliseconds.
_LOCK_SECONDS = 10.0
# What tensorstore raises when storage fails.
_ERRORS = (ValueError, RuntimeError, OSError, KeyError)


class Lease:
    """The lease in `store`, a directory that is called `where`."""

    def __init__(self, store: Any, where: str, lost_seconds: float):
        """`lost_seconds` without reaching the store end the process (0: never)."""
        self._store, self._where, self._lost_seconds = store, where, lost_seconds
        self._generation: bytes = b""
        self._own = {
            "owner": f"process {os.getpid()} on {socket.gethostname()}",
            "pid": os.getpid(),
            "host": _this_host(),
        }
        self._own["id"] = uuid4().hex
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="easylm-lease", daemon=True)

    def take(self):
        """Raises ConfigError if another holds it or it cannot be written; waits while that is not known."""
        found, generation = self._read()
        if found and not _is_dead(found):
            print(f"{self._where}: {found['owner']} may be training this run; watching it for up to {STALE_SECONDS:.0f} seconds",
                  file=sys.stderr, flush=True)  # fmt: skip
            until = time.monotonic() + STALE_SECONDS
            while time.monotonic() < until:
                time.sleep(min(2.0, STALE_SECONDS / 10))
                found, now = self._read()
                if found and now != generation:
                    self._refuse(found)
                if not found:
                    generation = now
                    break
        if not self._write(generation):
            found, _ = self._read()
            self._refuse(found or {"owner": "another process"})
        self._thread.start()

    def release(self):
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
            try:
                self._store.write(NAME, None, if_equal=self._generation).result(timeout=_ANSWER_SECONDS)
            except _ERRORS:
                pass  # it goes stale by itself

    def _refuse(self, found: dict) -> NoReturn:
        raise ConfigError(
            f"run_dir={self._where} is being trained by {found['owner']}; wait for it, stop it, or choose another run_dir"
        )

    def _read(self) -> tuple[dict | None, bytes]:
        """The lease, None if there is none, and its generation."""
        try:
            read = self._store.read(NAME).result(timeout=_ANSWER_SECONDS)
            return (json.loads(read.value) if read.value else None), read.stamp.generation
        except _ERRORS as error:
            raise ConfigError(f"run_dir={self._where}: cannot be read ({one_line(error)}); {_WAY_OUT}") from error

    def _write(self, generation: bytes) -> bool:
        """Whether the lease, that had this generation, is now this process's."""
        try:
            self._beat(generation)
        except _ERRORS as error:
            raise ConfigError(f"run_dir={self._where}: cannot be written ({one_line(error)}); {_WAY_OUT}") from error
        return bool(self._generation)

    def _beat(self, generation: bytes):
        content = json.dumps({**self._own, "time": round(time.time(), 3)}).encode()
        self._generation = (
            self._store.write(NAME, content, if_equal=generation).result(timeout=_ANSWER_SECONDS).generation
        )
        if not self._generation:
            # Perhaps this was done, and the answer lost.
            read = self._store.read(NAME).result(timeout=_ANSWER_SECONDS)
            if read.state == "value" and json.loads(read.value)["id"] == self._own["id"]:
                self._generation = read.stamp.generation

    def _keep(self):
        reached = time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            generation = self._generation
            try:
                self._beat(generation)
            except _ERRORS as error:
                self._generation = generation
                silent = time.monotonic() - reached
                if self._lost_seconds and silent > self._lost_seconds:
                    _end(
                        f"{self._where} could not be reached for {silent / 60:.1f} minutes (checkpoint.stuck_minutes): "
                        f"{one_line(error)}. Start again when it can: the run goes on from its newest checkpoint",
                        STUCK,
                    )
                continue
            if not self._generation:
                _end(f"{self._where} was taken over by another process, which did not hear of this one", STOPPED)
            reached = time.monotonic()


_WAY_OUT = "see that it exists, and that your credentials allow to read and write there"


def _end(message: str, code: int) -> NoReturn:
    """As hard as a kill: an orderly end would wait for storage, or write where it may not any more."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def _this_host() -> str:
    """Where a process's number means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{socket.gethostname()} {boot.read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid4().hex


def _is_dead(found: dict) -> bool:
    if found["host"] != _this_host():
        return False
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # it lives, and is another user's
    return False


def file_store(folder: Path) -> Any:
    """For a file system without locks: tensorstore then makes a lock file of its own, for as long as a write takes.

    A process that is killed in that moment leaves it, and it would keep everyone out for ever: one that stays the same
    for _LOCK_SECONDS is taken away.
    """
    lock = folder / f"{NAME}{LOCK}"
    found, until = _version(lock), time.monotonic() + _LOCK_SECONDS
    while found and _version(lock) == found:
        if time.monotonic() > until:
            lock.unlink(missing_ok=True)
        time.sleep(0.1)
    locking = {"file_io_locking": {"mode": "lockfile", "acquire_timeout": "30s"}}
    return ts.KvStore.open({"driver": "file", "path": f"{folder}/", "context": locking}).result()


def _version(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
