"""Ranges of bytes of any file: local ones, and through fsspec those whose name has a `scheme://`.

A read that fails is tried again below everything that parses. Its caller never notices, so no document is lost or read
twice. Only the bytes asked for are transferred; no file is downloaded as a whole.
"""

import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa

from easylm_mling.errors import ConfigError, one_line

Result = TypeVar("Result")

# Bytes read ahead. A remote request costs some 50 ms, so more there; but hundreds of files may be open on one host.
LOCAL_CHUNK, REMOTE_CHUNK = 1 << 16, 1 << 18
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http", "hf": "hf"}
# Errors of the transports that are no OSError, by module and name; only those of loaded modules can occur.
_TRANSPORT_ERRORS = (
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "TransportError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError)


class Retry(NamedTuple):
    """How often a failed read is tried again, and the seconds before the first retry; they double each time."""

    retries: int = 5
    seconds: float = 1.0


DEFAULT_RETRY = Retry()


def is_remote(name: str) -> bool:
    """Return True if the name has a `scheme://`."""
    return "://" in name


def stamp(name: str) -> str:
    """Return a local file's size and time of modification; empty if it is remote, or gone."""
    try:
        status = os.stat(name) if not is_remote(name) else None
    except OSError:
        status = None
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}" if status else ""


def attempt(name: str, retry: Retry, call: Callable[[], Result]) -> Result:
    """Return `call()`, which is tried again after each failure that may pass.

    Raises FileNotFoundError at once if the file is missing, and else, in the end, ConfigError with the file, the number of
    attempts and the cause.
    """
    for number in range(1, retry.retries + 2):
        try:
            return call()
        except (OSError, *transport_errors()) as error:
            if isinstance(error, FileNotFoundError) and _is_really_missing(error):
                raise
            if isinstance(error, _FINAL) or number > retry.retries:
                times = "1 attempt" if number == 1 else f"{number} attempts"
                raise ConfigError(
                    f"{name}: cannot be read, {times} ({one_line(error)}); see that it can be reached, and run again"
                ) from error
        time.sleep(retry.seconds * 2 ** (number - 1))
    raise AssertionError("the last attempt returns or raises")


def filesystem_of(name: str) -> tuple[Any, str]:
    """Return fsspec's file system of a remote name, and the path in it.

    Raises ConfigError for an unknown scheme, one whose package is not installed, and credentials in the name.
    """
    url = urlsplit(name)
    # Names are written to the catalog, the quarantine and the log, so they must not hold secrets.
    if "@" in url.netloc or (url.scheme in ("http", "https") and (url.query or url.fragment)):
        raise ConfigError(
            f"{url.scheme}://{url.netloc.rpartition('@')[2]}/...: write the address without a user, '?' or '#'; "
            "credentials are taken from the environment, as fsspec documents it"
        )
    try:
        return fsspec.core.url_to_fs(name)
    except ImportError as error:
        extra = _EXTRAS.get(url.scheme)
        install = f"pip install 'easylm-mling[{extra}]'" if extra else one_line(error)
        raise ConfigError(f"{name}: reading {url.scheme}:// needs another package: {install}") from error
    except ValueError as error:
        raise ConfigError(
            f"{name}: cannot be opened ({one_line(error)}); use a local path or {', '.join(_EXTRAS)}://"
        ) from error


def open_binary(name: str, retry: Retry, chunk: int | None = None) -> io.BufferedReader:
    """Open a file to read and seek in, `chunk` bytes at a time. It, and its reads, raise ConfigError in the end."""
    return io.BufferedReader(_Ranges(name, retry), chunk or (REMOTE_CHUNK if is_remote(name) else LOCAL_CHUNK))


def open_arrow(name: str, retry: Retry, chunk: int | None = None) -> pa.NativeFile:
    """Open a file for pyarrow. A local one is mapped, so that a large record batch takes no memory."""
    return pa.PythonFile(open_binary(name, retry, chunk), "r") if is_remote(name) else pa.memory_map(name)


class _Ranges(io.RawIOBase):
    """A file as ranges of bytes; a range that fails or comes short is read again as a whole."""

    def __init__(self, name: str, retry: Retry):
        super().__init__()
        self.name, self._retry, self._handle, self._at = name, retry, None, 0
        self.size: int = self._attempt(lambda: self._open().size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.size)[whence])
        return self._at

    def readinto(self, buffer) -> int:
        want = min(len(buffer), self.size - self._at)
        if want <= 0:
            return 0
        buffer[:want] = self._attempt(lambda: self._range(want))
        self._at += want
        return want

    def close(self):
        if not self.closed:
            self._drop()
            super().close()

    def _range(self, want: int) -> bytes:
        handle = self._handle or self._open()
        try:
            handle.seek(self._at)
            part = handle.read(want)
        except ValueError as error:
            raise ConfigError(
                f"{self.name}: its server does not give ranges of bytes ({one_line(error)}); copy the file elsewhere"
            ) from error
        if len(part) != want:
            raise OSError(f"{len(part)} bytes came of {want} from byte {self._at} on")
        return part

    def _attempt(self, call: Callable[[], Result]) -> Result:
        def afresh():
            try:
                return call()
            except BaseException:
                # The connection may be in any state, so the next attempt opens a new one.
                self._drop()
                raise

        try:
            return attempt(self.name, self._retry, afresh)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.name}: is not there; restore the file, or take it out of the source's paths"
            ) from error

    def _open(self):
        if not is_remote(self.name):
            self._handle = _Local(self.name)
            return self._handle
        filesystem, path = filesystem_of(self.name)
        self._handle = filesystem.open(path, "rb", cache_type="none")
        if self._handle.size is None:
            raise ConfigError(f"{self.name}: its server does not say how long it is; copy the file elsewhere")
        return self._handle

    def _drop(self):
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()


class _Local(io.FileIO):
    """A local file that knows its size, as fsspec's do."""

    @property
    def size(self) -> int:
        return os.fstat(self.fileno()).st_size


def transport_errors() -> list[type[BaseException]]:
    """Return the error classes of the transports that are loaded, other than OSError."""
    return [getattr(sys.modules[module], name) for module, name in _TRANSPORT_ERRORS if module in sys.modules]


def _is_really_missing(error: FileNotFoundError) -> bool:
    """Return False for other errors of HTTP: fsspec raises FileNotFoundError for them all, with the answer as its cause."""
    return error.__cause__ is None or getattr(error.__cause__, "status", None) in (404, 410)
