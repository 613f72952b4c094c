"""The files that a source's config names, and fingerprints that show whether one has changed.

Remote folders are listed one by one with fsspec's `ls`: its own `glob` silently leaves out what it fails to list.
"""

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from hashlib import blake2b
from typing import Any

from easylm_mling.config import HubDataset, SourceConfig
from easylm_mling.data.sources.splitting import format_of
from easylm_mling.errors import ConfigError, one_line
from easylm_mling.storage.files import Retry, attempt, filesystem_of, is_remote, open_binary

_EDGE_BYTES = 1 << 16
# Properties of a remote file that change with its content. The first that its file system gives is used; times come last.
_TAGS = (
    "md5Hash", "crc32c", "blob_id", "ETag", "etag", "Content-MD5", "Digest", "content_md5", "sha256", "checksum",
    "generation", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created",
)  # fmt: skip
# What `datasets` and others write beside data.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

# What fsspec says of a remote file; None if it was not asked.
Info = dict[str, Any] | None


def find_files(key: str, source: SourceConfig, retry: Retry, stored: tuple[str, ...]) -> dict[str, tuple[str, Info]]:
    """Return name -> (language, info) of every file of the source at `key`; raises ConfigError for a path without any.

    The language is what `{language}` stands for, or empty. `stored` are the names that the run began with. Those of a
    hub data set are kept, as they name the commit they were taken from.
    """
    if source.dataset:
        names = stored or _dataset_files(f"{key}.dataset", source.dataset, retry)
        return {name: ("", None) for name in names}
    files: dict[str, tuple[str, Info]] = {}
    for pattern in source.paths:
        matches = _match(f"{key}.paths", pattern, retry)
        if not matches:
            where = "" if is_remote(pattern) else f" (it is relative to {os.getcwd()})"
            raise ConfigError(f"{key}.paths: {pattern!r} matches no file; correct it{where}")
        files.update(matches)
    return files


def size_and_fingerprint(name: str, info: Info, retry: Retry) -> tuple[int, str]:
    """Return the bytes of a file, and a digest of them and of the content's tag, or else of both ends of the file.

    It takes at most two small reads, and any file that was written anew differs. Raises ConfigError if it is missing.
    """
    if is_remote(name):
        info = info if info and info.get("size") is not None else _info(name, retry)
        tag = next((f"{t} {info[t]}" for t in _TAGS if info and info.get(t)), None)
        if info and info.get("size") is not None and tag:
            size = int(info["size"])
            return size, blake2b(f"{size} {tag}".encode(), digest_size=16).hexdigest()
    with open_binary(name, retry) as file:
        size = file.seek(0, os.SEEK_END)
        digest = blake2b(str(size).encode(), digest_size=16)
        for start in (0, max(0, size - _EDGE_BYTES)):
            file.seek(start)
            digest.update(file.read(_EDGE_BYTES))
    return size, digest.hexdigest()


def _match(key: str, pattern: str, retry: Retry) -> dict[str, tuple[str, Info]]:
    parts = pattern.split("/")
    depth = parts.index("{language}") if "{language}" in parts else None
    if "{language}" in pattern and (depth is None or pattern.count("{language}") > 1 or "**" in parts):
        raise ConfigError(
            f"{key}: {pattern!r}: write {{language}} once, as one whole folder or file name, without '**'"
        )
    wild = pattern.replace("{language}", "*")
    # A folder stands for its files, but `*` at the end means files only.
    last = pattern.rstrip("/").split("/")[-1]
    folders = last == "{language}" or not glob.has_magic(last)
    matches = _remote(key, wild, folders, retry) if is_remote(pattern) else _local(key, wild, folders)
    return {name: ("" if depth is None else name.split("/")[depth], info) for name, info in matches}


def _local(key: str, pattern: str, folders: bool) -> Iterator[tuple[str, Info]]:
    for path in glob.glob(pattern, recursive=True):
        if os.path.isfile(path):
            yield path, None
        elif folders and os.path.isdir(path):
            below = sorted(_local_below(path.rstrip("/") or "/"))
            yield from ((name, None) for name in _data_files(key, path, below))


def _local_below(folder: str) -> Iterator[str]:
    def refuse(error: OSError):
        raise ConfigError(f"{folder}: cannot be listed ({one_line(error)}); give it read permission") from error

    for where, inside, names in os.walk(folder, onerror=refuse):
        inside[:] = [name for name in inside if not _hidden(name)]
        yield from (os.path.join(where, name) for name in names)


def _remote(key: str, pattern: str, folders: bool, retry: Retry) -> Iterator[tuple[str, Info]]:
    filesystem, path = filesystem_of(pattern)
    # A run that resumes in the same process must see what has changed.
    filesystem.invalidate_cache()
    scheme = pattern.split("://")[0]
    for info in _remote_matches(pattern, filesystem, path, retry):
        name = info["name"] if is_remote(info["name"]) else f"{scheme}://{info['name']}"
        if info["type"] == "file" and not pattern.endswith("/"):
            yield name, info
        elif folders:
            below = {i["name"]: i for i in _below(pattern, filesystem, info["name"], retry) if i["type"] == "file"}
            for inside in _data_files(key, name, sorted(below)):
                yield inside if is_remote(inside) else f"{scheme}://{inside}", below[inside]


def _remote_matches(pattern: str, filesystem, path: str, retry: Retry) -> list[dict]:
    """Return fsspec's info of every file or folder whose path matches."""
    parts = path.rstrip("/").split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    infos = [{"name": "/".join(parts[:first]), "type": None}]
    for part in parts[first:]:
        folders = [i["name"] for i in infos if i["type"] != "file"]
        if part == "**":
            infos += [info for folder in folders for info in _below(pattern, filesystem, folder, retry)]
        elif glob.has_magic(part):
            listed = [info for folder in folders for info in _ls(pattern, filesystem, folder, retry)]
            infos = [i for i in listed if _matches(i["name"].rsplit("/", 1)[-1], part)]
        else:
            infos = [{"name": f"{folder}/{part}", "type": None} for folder in folders]
    if path.endswith("/") and not glob.has_magic(parts[-1]):
        return [{**info, "type": "directory"} for info in infos]
    full = [info if info["type"] else _path_info(pattern, filesystem, info["name"], retry) for info in infos]
    return [info for info in full if info]


def _below(pattern: str, filesystem, folder: str, retry: Retry) -> Iterator[dict]:
    for info in _ls(pattern, filesystem, folder, retry):
        if not _hidden(info["name"].rsplit("/", 1)[-1]):
            yield info
            if info["type"] == "directory":
                yield from _below(pattern, filesystem, info["name"], retry)


def _ls(pattern: str, filesystem, folder: str, retry: Retry) -> list[dict]:
    """Return fsspec's info of the files and folders in a folder, sorted by name; none if it does not exist."""
    # A web server lists a folder at its address with a slash, or redirects there.
    address = f"{folder}/" if is_remote(folder) else folder
    try:
        listed = attempt(pattern, retry, lambda: filesystem.ls(address, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    infos = [{**info, "name": info["name"].rstrip("/")} for info in listed]
    # An object store may list a folder in itself, and a web server the links that sort its page.
    return sorted(
        (i for i in infos if i["name"] != folder.rstrip("/") and not (is_remote(folder) and "?" in i["name"])),
        key=lambda info: info["name"],
    )


def _path_info(pattern: str, filesystem, path: str, retry: Retry) -> dict | None:
    try:
        return attempt(pattern, retry, lambda: filesystem.info(path))
    except FileNotFoundError:
        return None


def _info(name: str, retry: Retry) -> dict:
    filesystem, path = filesystem_of(name)
    info = _path_info(name, filesystem, path, retry)
    if info is None:
        raise ConfigError(f"{name}: is not there; restore the file, or take it out of the source's paths")
    return info


def _matches(name: str, part: str) -> bool:
    return fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))


def _hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _data_files(key: str, folder: str, names: list[str]) -> list[str]:
    """Return those of a folder's files that hold data. Raises ConfigError for two formats: one of them may be no data."""
    bases = {name: name.rsplit("/", 1)[-1] for name in names}
    data = [name for name, base in bases.items() if not _hidden(base) and base not in _METADATA and format_of(base)]
    formats = sorted({format_of(bases[name]) or "" for name in data})
    if len(formats) > 1:
        raise ConfigError(
            f"{key}: the folder {folder} holds {' and '.join(formats)} files; name those wanted by a glob"
        )
    return data


def _dataset_files(key: str, dataset: HubDataset, retry: Retry) -> tuple[str, ...]:
    """Return the names of a data set's files, without downloading one; raises ConfigError if it cannot be resolved."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{key}: needs another package: pip install 'easylm-mling[hf]'") from error
    load = datasets.load_dataset_builder
    try:
        builder = attempt(dataset.name, retry, lambda: load(dataset.name, dataset.config, revision=dataset.revision))
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {dataset.name!r} cannot be found ({one_line(error)}); correct it") from error
    splits = builder.config.data_files or {}
    if dataset.split not in splits:
        names = ", ".join(map(str, splits)) or "none"
        raise ConfigError(f"{key}.split={dataset.split!r} is not in {dataset.name!r}; its splits are: {names}")
    return tuple(map(str, splits[dataset.split]))
