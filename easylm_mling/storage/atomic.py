"""Write files and directories that appear whole or not at all, whatever is killed when."""

import fcntl
import glob
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from easylm_mling.errors import ConfigError

_log = logging.getLogger(__name__)


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """A new directory beside `target` to write into; it takes the name `target` once the block ends without an error.

    Everything in it is on disk before the rename. After an error it is removed; a killed process leaves
    `.NAME.PROCESS.partial`, which nothing reads and which the next writer of `target` removes. Raises ConfigError
    unless `target` is new or an empty directory.
    """
    target = Path(target).absolute()
    _check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(target)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    # Says that its writer is alive; the system drops it when the process ends, however it ends.
    held = os.open(partial, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield partial
        for folder, _, names in os.walk(partial):
            for path in (*(Path(folder, name) for name in names), Path(folder)):
                _to_disk(path)
        # Someone else may have filled the target meanwhile: a rename onto a directory with content fails.
        _check_target(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(held)
    _to_disk(target.parent)


def write_atomically(path: str | Path, content: bytes):
    """Replace the file `path`; a reader, or a kill, never sees half of it."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into that takes the place of `path` once the block ends without an error."""
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _check_target(target: Path):
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: already exists and is not an empty directory; name another one or remove it")


def _remove_left_over(target: Path):
    """Removes what killed writers of `target` left. One that still writes holds its lock, and is left alone."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        held = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # also where the file system has no locks
            continue
        else:
            _log.warning("%s: removing %s, which a killed process left", target, partial.name)
            shutil.rmtree(partial)
        finally:
            os.close(held)


def _to_disk(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
