"""A lease on a run directory where storage has no locks: an object that its owner rewrites every few seconds.

Every write is conditional: it fails unless the lease is still the one that was read before. A process that finds another's
lease watches it by its own clock, since clocks differ. If it is not rewritten in STALE_SECONDS, its owner is dead or cut
off, and the lease is taken over. Whether a process of this machine is alive is known at once.
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
from easylm_mling.storage.object_store import whole_answer

NAME = "lease"
LOCK = ".__lock"  # tensorstore's suffix for the lock of a file
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
_ANSWER_SECONDS = 20.0  # a beat without an answer for as long has failed
# A lock file as old as this was left by a dead process, for a write takes milliseconds.
_LOCK_SECONDS = 10.0
_STORAGE_ERRORS = (ValueError, RuntimeError, OSError, KeyError)  # of tensorstore
_WAY_OUT = "see that it exists, and that your credentials allow to read and write there"


class Lease:
    """The lease in `store`, a tensorstore.KvStore that messages call `name`."""

    def __init__(self, store: Any, name: str, lost_seconds: float):
        """`lost_seconds` without reaching the store end the process (0: never)."""
        self._store, self._name, self._lost_seconds = store, name, lost_seconds
        self._generation: bytes = b""
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._own = {"owner": owner, "pid": os.getpid(), "host": _this_host(), "id": uuid4().hex}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="easylm-lease", daemon=True)

    def take(self):
        """Take the lease and keep it, from a thread of its own. Blocks while it is unknown if another's owner is alive.

        Raises ConfigError if another process holds it, or if it cannot be read or written.
        """
        other, generation = self._read()
        if other and not _is_dead(other):
            print(f"{self._name}: {other['owner']} may be training this run; watching it for up to {STALE_SECONDS:.0f} seconds",
                  file=sys.stderr, flush=True)  # fmt: skip
            end = time.monotonic() + STALE_SECONDS
            while other and time.monotonic() < end:
                time.sleep(min(2.0, STALE_SECONDS / 10))
                other, newest = self._read()
                if other and newest != generation:
                    self._refuse(other)
                generation = newest
        if not self._write(generation):
            other, _ = self._read()
            self._refuse(other or {"owner": "another process"})
        self._thread.start()

    def release(self):
        """Stop keeping the lease and remove it."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
            try:
                self._store.write(NAME, None, if_equal=self._generation).result(timeout=_ANSWER_SECONDS)
            except _STORAGE_ERRORS:
                pass  # it goes stale by itself

    def _refuse(self, other: dict) -> NoReturn:
        raise ConfigError(
            f"run_dir={self._name} is being trained by {other['owner']}; wait for it, stop it, or choose another run_dir"
        )

    def _read(self) -> tuple[dict | None, bytes]:
        """Return the lease, if there is one, and its generation."""
        try:
            read = whole_answer(self._store, NAME, self._store.read(NAME), _ANSWER_SECONDS)
            return (json.loads(read.value) if read.value else None), read.stamp.generation
        except _STORAGE_ERRORS as error:
            raise ConfigError(f"run_dir={self._name}: cannot be read ({one_line(error)}); {_WAY_OUT}") from error

    def _write(self, generation: bytes) -> bool:
        """Write the lease over this generation; returns False if another process was faster."""
        try:
            self._beat(generation)
        except _STORAGE_ERRORS as error:
            raise ConfigError(f"run_dir={self._name}: cannot be written ({one_line(error)}); {_WAY_OUT}") from error
        return bool(self._generation)

    def _beat(self, generation: bytes):
        """Write the lease over this generation; afterwards `_generation` is empty if it was another's."""
        content = json.dumps({**self._own, "time": round(time.time(), 3)}).encode()
        self._generation = (
            self._store.write(NAME, content, if_equal=generation).result(timeout=_ANSWER_SECONDS).generation
        )
        if not self._generation:
            # Perhaps the write succeeded and its answer was lost.
            read = whole_answer(self._store, NAME, self._store.read(NAME), _ANSWER_SECONDS)
            if read.state == "value" and json.loads(read.value)["id"] == self._own["id"]:
                self._generation = read.stamp.generation

    def _keep(self):
        """Rewrite the lease until it is released. Ends the process if the lease is lost."""
        reached = time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            generation = self._generation
            try:
                self._beat(generation)
            except _STORAGE_ERRORS as error:
                self._generation = generation
                silent = time.monotonic() - reached
                if self._lost_seconds and silent > self._lost_seconds:
                    _end(
                        f"{self._name} could not be reached for {silent / 60:.1f} minutes (checkpoint.stuck_minutes): "
                        f"{one_line(error)}. Start again when it can: the run goes on from its newest checkpoint",
                        STUCK,
                    )
                continue
            if not self._generation:
                _end(f"{self._name} was taken over by another process, which did not hear of this one", STOPPED)
            reached = time.monotonic()


def _end(message: str, code: int) -> NoReturn:
    """End the process as hard as a kill: an orderly end would wait for storage, or write where another now writes."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def _this_host() -> str:
    """Identify the machine, its boot and the PID namespace, in which a PID names one process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{socket.gethostname()} {boot.read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid4().hex


def _is_dead(other: dict) -> bool:
    """Return True if the owner was a process of this machine and is no more."""
    if other["host"] != _this_host():
        return False
    try:
        os.kill(other["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # alive, and another user's
    return False


def file_store(folder: Path) -> Any:
    """Open the store of a folder whose file system has no locks; tensorstore makes a lock file for each write.

    A process that is killed in a write leaves its lock file, which would keep everyone out for ever. A lock file that stays
    the same for _LOCK_SECONDS is therefore removed.
    """
    lock = folder / f"{NAME}{LOCK}"
    version, end = _version(lock), time.monotonic() + _LOCK_SECONDS
    while version and _version(lock) == version:
        if time.monotonic() > end:
            lock.unlink(missing_ok=True)
        time.sleep(0.1)
    locking = {"file_io_locking": {"mode": "lockfile", "acquire_timeout": "30s"}}
    return ts.KvStore.open({"driver": "file", "path": f"{folder}/", "context": locking}).result()


def _version(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns
