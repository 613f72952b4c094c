"""A run directory in a bucket, `gs://BUCKET/PATH`: its objects, and a local mirror of the run's small files.

Every process writes checkpoints straight to the bucket (checkpoint/checkpoint.py). All other files are written to a local
folder and pushed from there: every half minute, at the end, and before each checkpoint is committed, so that no
checkpoint is newer than the run's metrics and events. A process starts from an empty folder and what the bucket holds.

Objects cannot be renamed, but each appears whole or not at all, and a write can demand that the object is still the one
that was read. The first push writes config.yaml last, since it is what makes a directory a run's.
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
# Large objects lie in the bucket only, the launcher's files are no part of the run, and wandb uploads its own.
_NOT_MIRRORED = ("checkpoints/", "set-aside/", "lease", "launch/", "logs/", "wandb/")
_PUSH_SECONDS = 30.0
_ANSWER_SECONDS = 120.0  # of a request, with its retries
_WHOLE = 4_000_000  # bytes of a log; to a larger one only the new part is appended
_ADDED = ".added"  # suffix of a new part until it is appended


def is_bucket(name: str | Path) -> bool:
    """Return True for a `gs://` name."""
    return str(name).startswith("gs://")


def store_spec(folder: str | Path) -> dict:
    """Return the spec of tensorstore's key-value store for a folder, local or in a bucket."""
    if not is_bucket(folder):
        return {"driver": "file", "path": f"{folder}/"}
    url = urlsplit(str(folder))
    return {"driver": "gcs", "bucket": url.netloc, "path": f"{url.path.strip('/')}/"}


class Bucket:
    """The objects below `url`, by their names relative to it.

    Every method retries failures that may pass, and raises OSError in the end.
    """

    def __init__(self, url: str):
        """Raises ConfigError for a name without a folder, and without gcsfs."""
        parts = urlsplit(url)
        if not parts.netloc or not parts.path.strip("/"):
            raise ConfigError(f"{url}: name a bucket and a folder in it, gs://BUCKET/PATH")
        if find_spec("gcsfs") is None:
            raise ConfigError(f"{url}: gs:// needs another package: pip install 'easylm-mling[gcs]'")
        # Other libraries write too, so listings that gcsfs caches would go stale. Orbax makes its own gcsfs.
        for scheme in ("gs", "gcs"):
            fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
        self.url = url.rstrip("/")
        retries = {"max_retries": 10, "initial_delay": "500ms", "max_delay": "16s"}
        self.store: Any = self._result(ts.KvStore.open(store_spec(url) | {"context": {"gcs_request_retries": retries}}))

    def read(self, name: str) -> bytes | None:
        """Return the object's bytes, or None if there is none."""
        return self.read_all([name]).get(name)

    def read_all(self, names: list[str]) -> dict[str, bytes]:
        """Return name -> bytes of the objects that exist, read side by side."""
        futures = {name: self.store.read(name) for name in names}
        with _as_os_error(self.url):
            results = {
                name: whole_answer(self.store, name, future, _ANSWER_SECONDS) for name, future in futures.items()
            }
        return {name: r.value for name, r in results.items() if r.state == "value"}

    def write_all(self, contents: dict[str, bytes | None]):
        """Replace each object as a whole, or remove it (None)."""
        for future in [self.store.write(name, content) for name, content in contents.items()]:
            self._result(future)

    def names(self) -> list[str]:
        """List all names. Raises ConfigError for one that no file could have."""
        names = [name.decode() for name in self._result(self.store.list())]
        for name in names:
            if ".." in (parts := PurePosixPath(name).parts) or "/".join(parts) != name.rstrip("/"):
                raise ConfigError(f"{self.url}: holds an object with the strange name {name!r}; remove it")
        return names

    def append(self, name: str, added: bytes, size: int) -> bool:
        """Append to an object of `size` bytes, inside the bucket. Returns False if it now has another size than it should."""
        files, path = filesystem_of(self.url)
        with _as_os_error(self.url):
            files.pipe_file(f"{path}/{name}{_ADDED}", added)
            files.merge(f"{path}/{name}", [f"{path}/{name}", f"{path}/{name}{_ADDED}"])
            files.rm_file(f"{path}/{name}{_ADDED}")
            # A request whose answer was lost may have been carried out twice.
            return files.info(f"{path}/{name}")["size"] == size + len(added)

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Replace the object if it is `old` and no process trains the run; returns True if it was replaced."""
        with _as_os_error(self.url):
            stored = whole_answer(self.store, name, self.store.read(name), _ANSWER_SECONDS)
        if stored.value != old or self.read("lease") is not None:
            return False
        return bool(self._result(self.store.write(name, new, if_equal=stored.stamp.generation)).generation)

    def move(self, source: str, target: str, first: str):
        """Copy every object below the folder `source`, inside the bucket, and then remove them, `first` before the others."""
        files, path = filesystem_of(self.url)
        names = [n for n in self.names() if n.startswith(f"{source}/") and not n.endswith("/")]
        with _as_os_error(self.url):
            for name in names:
                files.cp_file(f"{path}/{name}", f"{path}/{target}/{name.removeprefix(f'{source}/')}")
        self.write_all({f"{source}/{first}": None})
        self.write_all(dict.fromkeys(names))

    def _result(self, future) -> Any:
        with _as_os_error(self.url):
            return future.result(timeout=_ANSWER_SECONDS)


def whole_answer(store: Any, name: str, first: Any, seconds: float) -> Any:
    """Return the result of `first`, a read of the object `name`, which is read twice more while it comes empty.

    tensorstore takes an answer that is cut off in its headers for an empty object. Each answer may take `seconds`.
    """
    answer = first.result(timeout=seconds)
    for _ in range(2):
        if answer.state == "value" and not answer.value:
            answer = store.read(name).result(timeout=seconds)
    return answer


@contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    """Turn whatever the libraries raise when storage fails into an OSError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # their classes are many, and not documented
        raise OSError(f"{url}: {one_line(error)}") from error


class _Pushed(NamedTuple):
    """A file as it was when it was pushed: a change shows in the first three fields."""

    inode: int
    changed: int
    size: int
    sent: int  # bytes of it in the bucket


class Mirror:
    """A local folder and its copy in a bucket.

    Call `pull`, then `start`, which pushes every half minute; `push` for what must be in the bucket at once; `close`.
    """

    def __init__(self, bucket: Bucket, folder: Path):
        self.bucket, self.folder = bucket, folder
        self._pushed: dict[str, _Pushed] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._push_now_and_then, name="easylm-mirror", daemon=True)

    def pull(self, to_train: bool = False) -> list[str]:
        """Make the folder a copy of the bucket's small files; returns all names in the bucket.

        Without a config.yaml the bucket holds no run yet, but what a killed first push left. `to_train` leaves that out.
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
        """Push the files that changed since the last push, config.yaml last, and remove those that are gone."""
        with self._lock:
            present = {f.relative_to(self.folder).as_posix(): f for f in sorted(self.folder.rglob("*")) if f.is_file()}
            files = {name: f for name, f in present.items() if not name.startswith(_NOT_MIRRORED) and not _is_draft(f)}
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
        """Start to push in the background."""
        self._thread.start()

    def close(self):
        """Stop pushing in the background, and push once more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self.push()

    def _send(self, files: dict[str, Path]):
        whole, states = {}, {}
        for name, file in files.items():
            before, log = self._pushed.get(name), name.endswith(".jsonl")
            try:
                state = _state_of(file, 0)
                if before and before[:3] == state[:3]:
                    continue
                content = file.read_bytes()
            except FileNotFoundError:
                continue  # replaced or removed just now
            if log:  # up to the last whole line
                content = content[: content.rfind(b"\n") + 1]
            states[name] = state._replace(sent=len(content))
            # Logs only ever grow; those of TensorBoard have no lines.
            is_log = log or "tfevents" in name
            if is_log and before and before.inode == state.inode and before.sent >= _WHOLE:
                sent, added = before.sent, content[before.sent :]
                if len(content) == sent or self.bucket.append(name, added, sent):
                    continue
            whole[name] = content
        self.bucket.write_all(whole)
        self._pushed |= states

    def _push_now_and_then(self):
        """Push every half minute. A failure is no harm: before a checkpoint is committed everything is pushed anyway."""
        while not self._over.wait(_PUSH_SECONDS):
            try:
                self.push()
            except OSError as error:
                print(f"warning: not pushed yet ({error})", file=sys.stderr, flush=True)


def run_files(run_dir: str | Path) -> Path:
    """Return `small_files` of a run's directory; raises ConfigError if it is none, or of another format."""
    files = small_files(run_dir)
    if not (files / CONFIG).is_file():
        raise ConfigError(f"{run_dir}: not a run's directory (no {CONFIG})")
    check_run_format(files, run_dir)
    return files


def check_run_format(files: Path, run_dir: str | Path):
    """Raise UnknownFormat unless this version can read the run in `run_dir`, whose small files are in `files`."""
    try:
        number = json.loads((files / FORMAT_FILE).read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        number = None
    check_format(run_dir, "run directory", number, RUN_FORMAT)


def write_run_format(files: Path):
    """Write the format number of a new run's directory."""
    write_atomically(files / FORMAT_FILE, json.dumps({"format": RUN_FORMAT}).encode())


def write_run_file(run_dir: str | Path, name: str, content: bytes):
    """Write one file of a run's directory whole, local or in a bucket; the directory may not exist yet."""
    if is_bucket(run_dir):
        Bucket(str(run_dir)).write_all({name: content})
        return
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(run_dir) / name, content)


def small_files(run_dir: str | Path) -> Path:
    """Return a folder with a run's small files, to read them: its own, or a copy of the bucket's while this process lives."""
    if not is_bucket(run_dir):
        return Path(run_dir)
    folder = Path(tempfile.mkdtemp(prefix="easylm_mling_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Mirror(Bucket(str(run_dir)), folder).pull()
    return folder


def local_folder(url: str, process: int) -> Path:
    """Return the folder, in the user's cache, in which this process of the run at `url` has its mirror."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "easylm_mling"
    name = f"{blake2b(url.encode(), digest_size=8).hexdigest()}-process-{process}"
    return cache / "runs" / name


def _is_draft(file: Path) -> bool:
    """Return True for files that storage/atomic.py has not renamed yet."""
    return file.suffix == ".tmp" or any(p.startswith(".") and p.endswith(".partial") for p in file.parts)


def _state_of(file: Path, sent: int) -> _Pushed:
    stat = file.stat()
    return _Pushed(stat.st_ino, stat.st_mtime_ns, stat.st_size, sent)
