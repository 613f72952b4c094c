"""The files that a source's config names, each once, and fingerprints that show whether one has changed.

Remote folders are listed one by one with fsspec's `ls`: its own `glob` silently leaves out what it fails to list.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from hashlib import blake2b
from typing import Any, NamedTuple

from easylm_mling.config import HubDataset, SourceConfig
from easylm_mling.data.sources import local_files
from easylm_mling.data.sources.splitting import KNOWN_SUFFIXES, format_of
from easylm_mling.errors import ConfigError, one_line
from easylm_mling.storage.files import Retry, attempt, filesystem_of, is_remote, open_binary

# A local file up to this size is read whole for its fingerprint; of each further MiB, so many bytes are.
_WHOLE_BYTES, _SAMPLE_BYTES = 1 << 26, 1 << 14
# Properties of a remote file that change with its content. The first that its file system gives is used; times come last.
_TAGS = (
    "md5Hash", "crc32c", "blob_id", "ETag", "etag", "Content-MD5", "Digest", "content_md5", "sha256", "checksum",
    "generation", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created",
)  # fmt: skip
# What `datasets` and others write beside data.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

# Names of one store.
_ALIASES = {"gcs": "gs", "s3a": "s3"}

# What fsspec says of a remote file; None if it was not asked.
Info = dict[str, Any] | None


class Listing(NamedTuple):
    """The files of a source: name -> (language, info), and what folders hold beside them, of no known format.

    The language is what `{language}` stands for, or empty.
    """

    files: dict[str, tuple[str, Info]]
    left_out: list[str]


def find_files(key: str, source: SourceConfig, retry: Retry, stored: tuple[str, ...]) -> Listing:
    """Return the files of the source at `key`, each by the first of its names.

    `stored` are the names that the run began with. Those of a hub data set are kept, as they name the commit they were
    taken from. Raises ConfigError for a path without a file, and for one that cannot be listed whole.
    """
    if source.dataset:
        names = stored or _dataset_files(f"{key}.dataset", source.dataset, retry)
        return Listing({name: ("", None) for name in names}, [])
    every = Listing({}, [])
    for pattern in source.paths:
        listing = _match(f"{key}.paths", pattern, retry)
        if not listing.files:
            where = "" if is_remote(pattern) else f" (it is relative to {os.getcwd()})"
            where += f"; it holds {_some(listing.left_out)}" if listing.left_out else ""
            raise ConfigError(f"{key}.paths: {pattern!r} matches no file; correct it{where}")
        every.files.update(listing.files)
        every.left_out.extend(listing.left_out)
    return Listing(_each_once(f"{key}.paths", every.files), every.left_out)


def left_out_text(names: Sequence[str]) -> str:
    """Return what is said of files that a source's folders hold and that are not read."""
    return f"not read, for their suffixes: {_some(names)}; known are {KNOWN_SUFFIXES}"


def size_and_fingerprint(name: str, info: Info, retry: Retry) -> tuple[int, str]:
    """Return the bytes of a file, and a digest of them and of the content's tag that its store gives.

    Without a tag the digest is of the content: the first 64 MiB whole, and 16 KiB of each further MiB. So a file that was
    edited at a single place far inside may pass for unchanged. Raises ConfigError if it is missing.
    """
    if is_remote(name) and (
        tagged := _size_and_tag(info if info and info.get("size") is not None else _info(name, retry))
    ):
        return tagged
    with open_binary(name, retry, chunk=_SAMPLE_BYTES) as file:
        size = file.seek(0, os.SEEK_END)
        digest = blake2b(str(size).encode(), digest_size=16)
        file.seek(0)
        for _ in range(0, min(size, _WHOLE_BYTES), 1 << 20):
            digest.update(file.read(1 << 20))
        for start in [*range(_WHOLE_BYTES, size, 1 << 20), max(0, size - _SAMPLE_BYTES)]:
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return size, digest.hexdigest()


def has_changed(name: str, size: int, fingerprint: str, retry: Retry) -> bool:
    """Ask a remote file's store whether it is still the one that was listed; False where the store gives no tag.

    Names of a hub data set hold a commit, so what they name cannot change.
    """
    if name.startswith("hf://") and "@" in name:
        return False
    filesystem_of(name)[0].invalidate_cache()
    now = _size_and_tag(_info(name, retry))
    return now is not None and now != (size, fingerprint)


def _size_and_tag(info: dict) -> tuple[int, str] | None:
    tag = next((f"{t} {info[t]}" for t in _TAGS if info.get(t)), None)
    if info.get("size") is None or not tag:
        return None
    size = int(info["size"])
    return size, blake2b(f"{size} {tag}".encode(), digest_size=16).hexdigest()


def _match(key: str, pattern: str, retry: Retry) -> Listing:
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
    left_out: list[str] = []
    matches = (
        _remote(key, wild, folders, retry, left_out) if is_remote(pattern) else _local(key, wild, folders, left_out)
    )
    files = {name: ("" if depth is None else name.split("/")[depth], info) for name, info in matches}
    for name in files:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{key}: {name!a}: the name is not text in UTF-8; rename the file") from None
    return Listing(files, left_out)


def _local(key: str, pattern: str, folders: bool, left_out: list[str]) -> Iterator[tuple[str, Info]]:
    for path in local_files.expand(key, pattern.rstrip("/") or "/"):
        if not local_files.is_folder(key, path):
            if not pattern.endswith("/"):
                yield path, None
        elif folders or os.path.lexists(pattern):
            below = list(local_files.files_below(key, path))
            yield from ((name, None) for name in _data_files(key, path, below, left_out))


def _each_once(key: str, files: dict[str, tuple[str, Info]]) -> dict[str, tuple[str, Info]]:
    """Leave out all names of a file but the first: links and patterns that overlap give it several."""
    names: dict[object, str] = {}
    for name in sorted(files):
        scheme, _, path = name.rpartition("://")
        of_file = (_ALIASES.get(scheme, scheme), path) if is_remote(name) else local_files.identity(name)
        first = names.setdefault(of_file, name)
        if files[first][0] != files[name][0]:
            raise ConfigError(f"{key}: {first} and {name} are one file, in two languages; remove one of its names")
    return {name: files[name] for name in names.values()}


def _remote(key: str, pattern: str, folders: bool, retry: Retry, left_out: list[str]) -> Iterator[tuple[str, Info]]:
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
            for inside in _data_files(key, name, sorted(below), left_out):
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
            continue
        infos = [{"name": f"{folder}/{part}", "type": None} for folder in folders]
        # What is there as it is written, such as `part[1].jsonl`, is meant as it is written.
        if glob.has_magic(part) and (
            "*" in part or not any(_path_info(pattern, filesystem, i["name"], retry) for i in infos)
        ):
            listed = [info for folder in folders for info in _ls(pattern, filesystem, folder, retry)]
            infos = [i for i in listed if _matches(i["name"].rsplit("/", 1)[-1], part)]
    if path.endswith("/") and not glob.has_magic(parts[-1]):
        return [{**info, "type": "directory"} for info in infos]
    full = [info if info["type"] else _path_info(pattern, filesystem, info["name"], retry) for info in infos]
    return [info for info in full if info]


def _below(pattern: str, filesystem, folder: str, retry: Retry) -> Iterator[dict]:
    for info in _ls(pattern, filesystem, folder, retry):
        if not local_files.hidden(info["name"].rsplit("/", 1)[-1]):
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


def _data_files(key: str, folder: str, names: list[str], left_out: list[str]) -> list[str]:
    """Return those of a folder's files that hold data; adds those of no known format to `left_out`.

    Raises ConfigError for two formats: one of them may be no data.
    """
    bases = {name: name.rsplit("/", 1)[-1] for name in names}
    bases = {name: base for name, base in bases.items() if not local_files.hidden(base) and base not in _METADATA}
    formats = {name: format_of(base) for name, base in bases.items()}
    left_out.extend(name for name, kind in formats.items() if kind is None)
    kinds = sorted({kind for kind in formats.values() if kind})
    if len(kinds) > 1:
        raise ConfigError(f"{key}: the folder {folder} holds {' and '.join(kinds)} files; name those wanted by a glob")
    return [name for name, kind in formats.items() if kind]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
