"""Write parameters as step 0 of a checkpoint while they are read or computed, a few pieces of one array in memory.

The step is what `Checkpoints.save_params` would have written: the same arrays, digests, info and metadata, for the same
readers. What a kill leaves is never a checkpoint: a directory takes its name at the end, and in a bucket the step is
committed at the end.
"""

import math
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tensorstore as ts

from easylm_mling.checkpoint.layout import COMMITTED, FOLDER
from easylm_mling.checkpoint.orbax_files import info_files, params_files, step_files
from easylm_mling.checkpoint.parameters import chunk_shapes
from easylm_mling.checkpoint.reading import packed
from easylm_mling.errors import ConfigError, one_line
from easylm_mling.model.params import Parameter
from easylm_mling.storage.ahead import ahead
from easylm_mling.storage.atomic import atomic_directory
from easylm_mling.storage.object_store import Bucket, is_bucket, store_spec
from easylm_mling.training.digests import Pieces, leaf_name

_STEP = f"{FOLDER}/0"
_IN_FLIGHT = 64_000_000  # bytes that are being written while the next are made
_FULL = "No space|Disk quota|File too large|EXHAUSTED"

# Yields one layer of a stack, or a whole parameter (layer 0), as flat float32 pieces in order, each in memory of its own.
Read = Callable[[Parameter, int], Iterable[np.ndarray]]


def write_checkpoint(
    target: str | Path, table: Sequence[Parameter], read: Read, describe: Callable[[Path], dict]
) -> None:
    """Write the parameters of `table` as a new checkpoint in `target`, a directory or a place in a bucket.

    `describe(folder)` is called when all have been read: it puts what lies beside the step into `folder`, and returns the
    step's `info`. Raises ConfigError, and leaves nothing, for a target with content and a disk that is too small; what
    `read` and `describe` raise also leaves nothing.
    """
    if not is_bucket(target):
        check_room(target, 4 * sum(math.prod(p.shape) for p in table), "float32 parameters")
        with _full_disk_told(target), atomic_directory(target) as folder:
            for name, content in _write_step(folder / _STEP, table, read, lambda: describe(folder)).items():
                file = folder / _STEP / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(content, encoding="utf-8")
        return
    bucket = Bucket(str(target))
    if bucket.names():
        raise ConfigError(f"{target}: already holds something; name another one or remove it")
    with _removed_after_an_error(bucket) as written, TemporaryDirectory() as name:
        beside = Path(name)
        step = _write_step(f"{bucket.url}/{_STEP}", table, read, lambda: describe(beside))
        contents: dict[str, bytes | None] = {f"{_STEP}/{n}": content.encode() for n, content in step.items()}
        commit = {f"{_STEP}/{COMMITTED}": contents.pop(f"{_STEP}/{COMMITTED}")}
        contents |= {f.relative_to(beside).as_posix(): f.read_bytes() for f in beside.rglob("*") if f.is_file()}
        written += contents
        bucket.write_all(contents)
        bucket.write_all(commit)


def check_room(target: str | Path, needed: int, what: str):
    """Raise ConfigError where the disk of `target` has no room for so many bytes of `what`."""
    folder = next(p for p in Path(target).absolute().parents if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{target}: the {what} need {needed / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB left; make room, or name "
            "a place on another disk"
        )


def _write_step(
    where: str | Path, table: Sequence[Parameter], read: Read, describe: Callable[[], dict]
) -> dict[str, str]:
    """Write the arrays of a step; return its other files by name, what commits it last."""
    began = time.time()
    with _Arrays(where) as arrays:
        digests = {leaf_name("params", *p.path.split(".")): arrays.write(p, read) for p in table}
    info = describe() | {"digests": {name: digests[name] for name in sorted(digests)}}
    chunks = {p.path: chunk_shapes(p)[1] for p in table}
    return (
        {f"params/{name}": content for name, content in params_files(table, chunks).items()}
        | {f"info/{name}": content for name, content in info_files(packed(info)).items()}
        | step_files(began)
    )


class _Arrays:
    """The arrays of a step that is being written: a few chunks are in flight. Leaving it waits for those."""

    def __init__(self, where: str | Path):
        folder = store_spec(f"{where}/params")
        # Data files have names of their own and need no renames; the manifest, which makes them count, does.
        base = folder | ({} if is_bucket(str(where)) else {"file_io_locking": {"mode": "non_atomic"}})
        self._store = {
            "driver": "ocdbt",
            "base": base,
            "manifest": folder,
            "target_data_file_size": 400_000_000,
            "config": {
                "max_inline_value_bytes": 1024,
                "max_decoded_node_bytes": 100_000_000,
                "manifest_kind": "single",
            },
            "assume_config": True,
        }
        self._context = ts.Context({"gcs_request_retries": {"max_retries": 10}})
        self._where = where
        self._writes: deque[tuple[Any, int]] = deque()

    def write(self, p: Parameter, read: Read) -> str:
        """Write one parameter; return its digest."""
        spec = {
            "driver": "zarr3",
            "kvstore": self._store | {"path": f"{p.path}/"},
            "metadata": _metadata(p),
            "store_data_equal_to_fill_value": True,
        }
        with _as_os_error(self._where):
            array: Any = ts.open(spec, create=True, open=True, context=self._context).result()
        digest = Pieces()
        for layer in range(p.shape[0]) if p.stacked else (0,):
            view = array[layer] if p.stacked else array
            rows = chunk_shapes(p)[0][1 if p.stacked else 0]
            for start, values in _chunks(ahead(read(p, layer)), view.shape, rows):
                first = layer * view.size + start * math.prod(view.shape[1:])
                digest.add(values.reshape(1, -1), first, values.size)
                self._begin(view[start : start + values.shape[0]], values)
        return str(digest)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._wait(0)
        while self._writes:  # after an error: nothing may be written any more where all is removed
            with suppress(ValueError):
                self._writes.popleft()[0].result()

    def _begin(self, view: Any, values: np.ndarray):
        write = view.write(values, can_reference_source_data_indefinitely=True)
        self._writes.append((write.commit, values.nbytes))
        self._wait(_IN_FLIGHT)

    def _wait(self, allowed: int):
        """Wait until so few bytes are in flight."""
        while self._writes and sum(size for _, size in self._writes) > allowed:
            with _as_os_error(self._where):
                self._writes[0][0].result()
            self._writes.popleft()


def _metadata(p: Parameter) -> dict:
    """The zarr metadata of a parameter, as Orbax has it."""
    written, read = chunk_shapes(p)
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    shards = {
        "chunk_shape": read,
        "codecs": plain,
        "index_codecs": [*plain, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": p.shape,
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": written}},
        "codecs": [{"name": "sharding_indexed", "configuration": shards}],
    }


def _chunks(pieces: Iterable[np.ndarray], shape: tuple[int, ...], rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, values) of each `rows` rows of an array of `shape`, whose flat values come in `pieces`."""
    width, start, filled = math.prod(shape[1:]), 0, 0
    chunk = np.empty(min(rows, shape[0]) * width, np.float32)
    for piece in pieces:
        taken = 0
        while taken < piece.size:
            assert chunk.size, (shape, "more values than the array has")
            count = min(piece.size - taken, chunk.size - filled)
            chunk[filled : filled + count] = piece[taken : taken + count]
            taken, filled = taken + count, filled + count
            if filled == chunk.size:
                yield start, chunk.reshape(-1, *shape[1:])
                start, filled = start + chunk.size // width, 0
                chunk = np.empty(min(rows, shape[0] - start) * width, np.float32)
    assert start == shape[0] and filled == 0, (shape, start, filled)


@contextmanager
def _as_os_error(where: str | Path) -> Iterator[None]:
    """Turn what tensorstore raises when storage fails into an OSError."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{where}: {one_line(error)}") from error


@contextmanager
def _full_disk_told(target: str | Path) -> Iterator[None]:
    """Turn what is raised on a full disk into an error of one line with the way out."""
    try:
        yield
    except OSError as error:
        if not re.search(_FULL, str(error)):
            raise
        raise ConfigError(f"{target}: the disk is full; make room, or name a place on another disk") from None


@contextmanager
def _removed_after_an_error(bucket: Bucket) -> Iterator[list[str]]:
    """If the block raises, remove the step and the objects whose names it put into the list."""
    written: list[str] = []
    try:
        yield written
    except BaseException:
        with suppress(OSError):  # out of reach; without its commit it is no checkpoint
            step = [name for name in bucket.names() if name.startswith(f"{_STEP}/")]
            bucket.write_all(dict.fromkeys([*step, *written]))
        raise
