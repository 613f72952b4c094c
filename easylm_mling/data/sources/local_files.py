"""The local files behind a path or pattern. Links are followed; a loop, a dangling link, and what is no file are refused.

The standard library's glob leaves out a dangling link without a word, follows a loop to the system's limit, and takes the
name of a file with brackets for a pattern of others.
"""

import glob
import os
import stat
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from easylm_mling.errors import ConfigError, one_line


def expand(key: str, pattern: str) -> Iterator[str]:
    """Yield the files and folders that match `pattern`, with `*`, `?`, `[...]` and `**` as in glob.

    What is there as it is written, is meant as it is written: a whole path, or a part of one without `*`. A name that
    begins with a dot must be written so. Raises ConfigError, beginning with `key`, for a link that leads nowhere or in a
    circle, and a folder that cannot be listed.
    """
    if os.path.lexists(pattern):
        yield pattern
        return
    first, *rest = pattern.split("/")
    start = "/" if pattern.startswith("/") else ""
    yield from _expand(key, start, rest if start else [first, *rest])


def files_below(key: str, folder: str) -> Iterator[str]:
    """Yield every file below `folder`, in order of names, those behind links included. Hidden ones are left out.

    Raises ConfigError as `expand` does.
    """
    return (path for path in _below(key, folder, hidden) if not is_folder(key, path))


def hidden(name: str) -> bool:
    """Return True for the names that tools use for what is no data: those that begin with a dot or an underscore."""
    return name.startswith((".", "_"))


def is_folder(key: str, path: str) -> bool:
    """Return whether `path` is a folder and no file; raises ConfigError for whatever is neither."""
    mode = _status(key, path).st_mode
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise ConfigError(f"{key}: {path} is a pipe, socket or device and no file; name files only, or remove it")
    return stat.S_ISDIR(mode)


def identity(path: str) -> tuple:
    """Return what all names of one file have in common."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else (os.path.realpath(path),)


def _expand(key: str, base: str, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield base
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _expand(key, base, rest) if rest else ()
        for path in _below(key, base, lambda name: name.startswith(".")):
            if not rest:
                yield path
            elif is_folder(key, path):
                yield from _expand(key, path, rest)
    elif not glob.has_magic(part) or ("*" not in part and os.path.lexists(_join(base, part))):
        path = _join(base, part)
        if os.path.lexists(path) and (not rest or is_folder(key, path)):
            yield from _expand(key, path, rest)
    else:
        for name in _names(key, base):
            if fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
                path = _join(base, name)
                if not rest or is_folder(key, path):
                    yield from _expand(key, path, rest)


def _below(key: str, folder: str, left_out: Callable[[str], bool], above: tuple = ()) -> Iterator[str]:
    """Yield everything below `folder`; `above` are the identities of the folders that it was reached through."""
    here = identity(folder or ".")
    if here in above:
        raise ConfigError(
            f"{key}: {folder} is a link to a folder that it lies in; remove it, or name the files by a pattern"
        )
    for name in _names(key, folder):
        if not left_out(name):
            path = _join(folder, name)
            yield path
            if stat.S_ISDIR(_status(key, path).st_mode):
                yield from _below(key, path, left_out, (*above, here))


def _names(key: str, folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be listed ({one_line(error)}); give it read permission") from error


def _status(key: str, path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        if not os.path.islink(path):
            raise ConfigError(f"{key}: {path} cannot be read ({one_line(error)}); give it read permission") from error
        target = os.readlink(path)
        raise ConfigError(
            f"{key}: {path} is a link to {target}, which is not there; restore it, or remove the link"
        ) from error


def _join(base: str, name: str) -> str:
    return os.path.join(base, name) if base else name
