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
    """Yield a new directory beside `target`, which is renamed to `target` when the block ends without an error.

    Its content is on disk before the rename. After an error it is removed. A killed process leaves `.NAME.PROCESS.partial`,
    which nothing reads and the next writer of `target` removes. Raises ConfigError unless `target` is new or empty.
    """
    target = Path(target).absolute()
    check_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(target)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    # The lock shows that the writer lives: the system drops it when the process ends, however it ends.
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield partial
        for folder, _, names in os.walk(partial):
            for path in (*(Path(folder, name) for name in names), Path(folder)):
                _sync(path)
        # A rename onto a directory with content fails, and another process may have filled the target meanwhile.
        check_new(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    _sync(target.parent)


def write_atomically(path: str | Path, content: bytes):
    """Replace the file `path` so that no reader, even after a kill, sees half of it."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a file to write into, which replaces `path` when the block ends without an error."""
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


def check_new(target: str | Path):
    """Raise ConfigError unless `target` is new, or an empty directory."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: already exists and is not an empty directory; name another one or remove it")


def _remove_left_over(target: Path):
    """Remove what killed writers of `target` left. A living writer holds its lock, and its directory stays."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # also where the file system has no locks
            continue
        else:
            _log.warning("%s: removing %s, which a killed process left", target, partial.name)
            shutil.rmtree(partial)
        finally:
            os.close(lock)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
