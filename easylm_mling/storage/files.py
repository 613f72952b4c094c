"""Ranges of bytes of any file: local ones, and through fsspec those whose name has a `scheme://`.

A read that fails is tried again, below everything that parses: whoever reads never learns of it, so no document is
lost or read twice. Only the bytes asked for travel; no file is ever fetched whole.
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

# Read ahead. More for remote files, where a request costs some 50 ms; hundreds of files may be open on one host.
LOCAL_CHUNK, REMOTE_CHUNK = 1 << 16, 1 << 18
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http", "hf": "hf"}
# What the transports raise that is no OSError. Each is looked for only once its library is loaded.
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
    """How often a failed read is tried again, and the seconds before the first time; they double each time."""

    retries: int = 5
    seconds: float = 1.0


DEFAULT_RETRY = Retry()


def is_remote(name: str) -> bool:
    return "://" in name


def attempt(name: str, retry: Retry, call: Callable[[], Result]) -> Result:
    """`call()`, again after each failure that may pass.

    Raises FileNotFoundError at once, and ConfigError, naming the file, the attempts and the cause, in the end.
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
    """fsspec's file system of a remote name, and the path there.

    Raises ConfigError for an unknown scheme, one whose package is not installed, or credentials in the name.
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
    """A file to read and seek in, `chunk` bytes at a time. What cannot be read raises ConfigError."""
    return io.BufferedReader(_Ranges(name, retry), chunk or (REMOTE_CHUNK if is_remote(name) else LOCAL_CHUNK))


def open_arrow(name: str, retry: Retry, chunk: int | None = None) -> pa.NativeFile:
    """The same for Arrow. A local file is mapped: then a large record batch takes no memory of ours."""
    return pa.PythonFile(open_binary(name, retry, chunk), "r") if is_remote(name) else pa.memory_map(name)


class _Ranges(io.RawIOBase):
    """A file as ranges of bytes, each read again from the start if it fails or comes short."""

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
            found = handle.read(want)
        except ValueError as error:
            raise ConfigError(
                f"{self.name}: its server does not give ranges of bytes ({one_line(error)}); copy the file elsewhere"
            ) from error
        if len(found) != want:
            raise OSError(f"{len(found)} bytes came of {want} from byte {self._at} on")
        return found

    def _attempt(self, call: Callable[[], Result]) -> Result:
        def afresh():
            try:
                return call()
            except BaseException:
                # Whatever state the connection is in, the next attempt has a new one.
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
    return [getattr(sys.modules[module], name) for module, name in _TRANSPORT_ERRORS if module in sys.modules]


def _is_really_missing(error: FileNotFoundError) -> bool:
    """fsspec's HTTP raises FileNotFoundError for whatever went wrong, with the server's answer as its cause."""
    return error.__cause__ is None or getattr(error.__cause__, "status", None) in (404, 410)
