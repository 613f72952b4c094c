"""A run directory in a bucket, `gs://BUCKET/PATH`: its objects, and a local mirror of the run's small files.

Checkpoints go from every process straight to the bucket (checkpoint/checkpoint.py). All else is written to a local folder, as in any
run, and pushed from there: what has changed every half minute, at the end, and before each checkpoint is committed, so
that a checkpoint that counts never knows more than the record of the run. The bucket is the truth: a process begins with
an empty folder and what the bucket holds.

Nothing in a bucket can be renamed, but an object appears whole or not at all, and can be written on condition that it is
the one that was read before. config.yaml, which makes a directory a run's, is therefore the first push's last object.
"""

import atexit
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec.config
import tensorstore as ts

from easylm_mling.errors import ConfigError, check_format, one_line
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.files import filesystem_of

CONFIG, FORMAT_FILE = "config.yaml", "format.json"
# Of a run's directory: which files it has, and what they mean.
RUN_FORMAT = 1
# What is no small file of a run lies in the bucket only; the launcher's are not the run's, and wandb brings its own away.
_NOT_MIRRORED = ("checkpoints/", "set-aside/", "lease", "launch/", "logs/", "wandb/")
_PUSH_SECONDS = 30.0
# Seconds until a request without an answer is given up, its retries included.
_PATIENCE = 120.0
# A log of more bytes is not pushed whole but grows by what was added.
_WHOLE = 4_000_000
# Ends the name of what was added last, until it is.
_ADDED = ".added"


def is_bucket(name: str | Path) -> bool:
    return str(name).startswith("gs://")


def store_spec(folder: str | Path) -> dict:
    """tensorstore's key-value store of a folder, local or in a bucket."""
    if not is_bucket(folder):
        return {"driver": "file", "path": f"{folder}/"}
    url = urlsplit(str(folder))
    return {"driver": "gcs", "bucket": url.netloc, "path": f"{url.path.strip('/')}/"}


class Bucket:
    """The objects below `url`, by their names there. Failures that may pass are tried again; then OSError is raised."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if not parts.netloc or not parts.path.strip("/"):
            raise ConfigError(f"{url}: name a bucket and a folder in it, gs://BUCKET/PATH")
        if find_spec("gcsfs") is None:
            raise ConfigError(f"{url}: gs:// needs another package: pip install 'easylm-mling[gcs]'")
        # Others write beside gcsfs, whose listings would go stale; and Orbax makes its own.
        for scheme in ("gs", "gcs"):
            fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
        self.url = url.rstrip("/")
        retries = {"max_retries": 10, "initial_delay": "500ms", "max_delay": "16s"}
        self.store: Any = self._result(ts.KvStore.open(store_spec(url) | {"context": {"gcs_request_retries": retries}}))

    def read(self, name: str) -> bytes | None:
        found = self._result(self.store.read(name))
        return found.value if found.state == "value" else None

    def read_all(self, names: list[str]) -> dict[str, bytes]:
        under_way = {name: self.store.read(name) for name in names}
        found = {name: self._result(future) for name, future in under_way.items()}
        return {name: r.value for name, r in found.items() if r.state == "value"}

    def write_all(self, contents: dict[str, bytes | None]):
        """Each object is replaced whole, or removed (None)."""
        for future in [self.store.write(name, content) for name, content in contents.items()]:
            self._result(future)

    def names(self) -> list[str]:
        """Raises ConfigError for one that could not be a file's."""
        found = [name.decode() for name in self._result(self.store.list())]
        for name in found:
            if ".." in (parts := PurePosixPath(name).parts) or "/".join(parts) != name.rstrip("/"):
                raise ConfigError(f"{self.url}: holds an object with the strange name {name!r}; remove it")
        return found

    def append(self, name: str, added: bytes, size: int) -> bool:
        """Whether the object, of `size` bytes before, now has `added` at its end (the bucket joins the two)."""
        files, path = filesystem_of(self.url)
        with _as_os_error(self.url):
            files.pipe_file(f"{path}/{name}{_ADDED}", added)
            files.merge(f"{path}/{name}", [f"{path}/{name}", f"{path}/{name}{_ADDED}"])
            files.rm_file(f"{path}/{name}{_ADDED}")
            # A request whose answer was lost may have been done twice.
            return files.info(f"{path}/{name}")["size"] == size + len(added)

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Whether the object, that was `old`, is now `new`. Not while the run is trained: then only the trainer writes."""
        found = self._result(self.store.read(name))
        if found.value != old or self.read("lease") is not None:
            return False
        return bool(self._result(self.store.write(name, new, if_equal=found.stamp.generation)).generation)

    def move(self, source: str, target: str, first: str):
        """Copy every object below the folder `source`, in the bucket, then remove them: the one called `first` before others."""
        files, path = filesystem_of(self.url)
        names = [n for n in self.names() if n.startswith(f"{source}/") and not n.endswith("/")]
        with _as_os_error(self.url):
            for name in names:
                files.cp_file(f"{path}/{name}", f"{path}/{target}/{name.removeprefix(f'{source}/')}")
        self.write_all({f"{source}/{first}": None})
        self.write_all(dict.fromkeys(names))

    def _result(self, future) -> Any:
        with _as_os_error(self.url):
            return future.result(timeout=_PATIENCE)


@contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    """Within it, whatever the libraries raise when storage fails becomes an OSError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise OSError(f"{url}: {one_line(error)}") from error


class _Pushed(NamedTuple):
    """A file as it was when the bucket got it: what tells that it has changed, and how much of it the bucket has."""

    inode: int
    changed: int
    size: int
    sent: int


class Mirror:
    """A local folder and the bucket it is pushed to. Use: `pull`, then `start`; `push` whenever it must be there; `close`."""

    def __init__(self, bucket: Bucket, folder: Path):
        self.bucket, self.folder = bucket, folder
        self._pushed: dict[str, _Pushed] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._push_now_and_then, name="easylm-mirror", daemon=True)

    def pull(self, to_train: bool = False) -> list[str]:
        """Make the folder what the bucket holds, and return all names there.

        Without a config.yaml it holds no run yet; what a first push that was killed has left is then nothing `to_train` with.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        names = self.bucket.names()
        wanted = [n for n in names if not n.startswith(_NOT_MIRRORED) and not n.endswith(("/", _ADDED))]
        if to_train and CONFIG not in names:
            wanted = [n for n in wanted if n == "plan.json"]
        for name, content in self.bucket.read_all(wanted).items():
            file = self.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            self._pushed[name] = _state_of(file, len(content))
        return names

    def push(self):
        """Bring to the bucket whatever has changed since the last time, config.yaml last, and then remove what is gone."""
        with self._lock:
            found = {f.relative_to(self.folder).as_posix(): f for f in sorted(self.folder.rglob("*")) if f.is_file()}
            files = {name: f for name, f in found.items() if not name.startswith(_NOT_MIRRORED) and not _is_draft(f)}
            if CONFIG not in files:
                raise OSError(f"{self.folder}: something has removed this run's files; leave them while it is trained")
            config = files.pop(CONFIG)
            self._send(files)
            self._send({CONFIG: config})
            gone = self._pushed.keys() - files.keys() - {CONFIG}
            self.bucket.write_all(dict.fromkeys(gone))
            for name in gone:
                del self._pushed[name]

    def start(self):
        self._thread.start()

    def close(self):
        """Push what is left, unless that was done or cannot be."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self.push()

    def _send(self, files: dict[str, Path]):
        whole, states = {}, {}
        for name, file in files.items():
            before, log = self._pushed.get(name), name.endswith(".jsonl")
            try:
                now = _state_of(file, 0)
                if before and before[:3] == now[:3]:
                    continue
                content = file.read_bytes()
            except FileNotFoundError:
                continue  # replaced or removed just now
            if log:  # up to the last whole line
                content = content[: content.rfind(b"\n") + 1]
            states[name] = now._replace(sent=len(content))
            # Both are only ever added to; TensorBoard's files have no lines.
            grows = log or "tfevents" in name
            grown = grows and before and before.inode == now.inode and before.sent >= _WHOLE
            if not (grown and before and self._append(name, content, before.sent)):
                whole[name] = content
        self.bucket.write_all(whole)
        self._pushed |= states

    def _append(self, name: str, content: bytes, sent: int) -> bool:
        return len(content) == sent or self.bucket.append(name, content[sent:], sent)

    def _push_now_and_then(self):
        """The record is only late when this fails; what must not be late is pushed before a checkpoint is committed."""
        while not self._over.wait(_PUSH_SECONDS):
            try:
                self.push()
            except OSError as error:
                print(f"warning: not pushed yet ({error})", file=sys.stderr, flush=True)


def run_files(run_dir: str | Path) -> Path:
    """`small_files` of what must be a run's directory; raises ConfigError if it is none."""
    files = small_files(run_dir)
    if not (files / CONFIG).is_file():
        raise ConfigError(f"{run_dir}: not a run's directory (no {CONFIG})")
    check_run_format(files, run_dir)
    return files


def check_run_format(files: Path, run_dir: str | Path):
    """Raise UnknownFormat unless this version can read the run in `run_dir`, whose small files lie in `files`."""
    try:
        number = json.loads((files / FORMAT_FILE).read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        number = None
    check_format(run_dir, "run directory", number, RUN_FORMAT)


def write_run_format(files: Path):
    write_atomically(files / FORMAT_FILE, json.dumps({"format": RUN_FORMAT}).encode())


def write_run_file(run_dir: str | Path, name: str, content: bytes):
    """Write one file of a run's directory whole, local or in a bucket; the directory may not exist yet."""
    if is_bucket(run_dir):
        Bucket(str(run_dir)).write_all({name: content})
        return
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(run_dir) / name, content)


def small_files(run_dir: str | Path) -> Path:
    """The folder of a run's small files, to read them: itself, or for as long as this process lives a copy of the bucket's."""
    if not is_bucket(run_dir):
        return Path(run_dir)
    folder = Path(tempfile.mkdtemp(prefix="easylm_mling_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Mirror(Bucket(str(run_dir)), folder).pull()
    return folder


def local_folder(url: str, process: int) -> Path:
    """Where process `process` of the run at `url` keeps its mirror; in the user's cache, and only for as long as it lives."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "easylm_mling"
    name = f"{blake2b(url.encode(), digest_size=8).hexdigest()}-process-{process}"
    return cache / "runs" / name


def _is_draft(file: Path) -> bool:
    """What storage/atomic.py has not renamed yet."""
    return file.suffix == ".tmp" or any(p.startswith(".") and p.endswith(".partial") for p in file.parts)


def _state_of(file: Path, sent: int) -> _Pushed:
    found = file.stat()
    return _Pushed(found.st_ino, found.st_mtime_ns, found.st_size, sent)
