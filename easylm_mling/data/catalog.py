"""The list of everything a run reads: its files, and the units they are cut into.

Built once, kept in the run directory, and compared on every resume: a run whose files changed under it is refused,
because the order of its data would no longer be the order its checkpoint counts in.
"""

import glob
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import orjson

from easylm_mling.atomic import write_whole
from easylm_mling.config import ConfigError, DataConfig, SourceConfig
from easylm_mling.data.layouts import cut, layout_of
from easylm_mling.data.readers import DAMAGE, damaged

UNITS_PER_BLOCK = 4
_VERSION = 1
_EDGE_BYTES = 1 << 16
# Everything but the files that decides the order of the data; not the weights, which may change during a run.
_DATA_KEYS = ("seed", "block_bytes", "sequence_length")
_SOURCE_KEYS = ("text_column", "row", "holdout_fraction", "language_temperature", "language_max_repeats")


@dataclass(frozen=True)
class File:
    """One file as it was listed; `name` is relative if the config's path is."""

    name: str
    layout: str
    language: str
    size: int
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """The files and units of one source.

    `units` is int64 [units, 4]: index into `files`, first position, position after the last, estimated bytes of text.
    `settings` are the values of the source's config that decide the order and content of its documents.
    """

    name: str
    files: tuple[File, ...]
    units: np.ndarray
    settings: dict

    @cached_property
    def languages(self) -> tuple[str, ...]:
        return tuple(sorted({f.language for f in self.files}))

    @cached_property
    def unit_languages(self) -> np.ndarray:
        """int64 [units]: index into `languages`."""
        of_file = np.array([self.languages.index(f.language) for f in self.files], np.int64)
        return of_file[self.units[:, 0]]


@dataclass(frozen=True)
class Catalog:
    """All sources of a run, in the order of the config."""

    sources: dict[str, Source]
    settings: dict

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides which document comes when."""
        return blake2b(orjson.dumps(self._tree()), digest_size=16).hexdigest()

    def save(self, path: str | Path):
        """Write as JSON; a reader never sees half a file."""
        write_whole(path, orjson.dumps(self._tree()))

    @classmethod
    def load(cls, path: str | Path) -> "Catalog":
        """Read what `save` wrote; raises ConfigError if it is missing, damaged or of another version."""
        try:
            tree = orjson.loads(Path(path).read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise ConfigError(
                f"{path}: not a readable catalog ({error}); restore it, or start a new run_dir"
            ) from error
        version = tree.get("version") if isinstance(tree, dict) else None
        if version != _VERSION:
            raise ConfigError(
                f"{path}: catalog version {version}, this code writes {_VERSION}; use the code that began the run"
            )
        sources = {}
        for s in tree["sources"]:
            units = np.array(s["units"], np.int64).reshape(-1, 4)
            sources[s["name"]] = Source(s["name"], tuple(File(**f) for f in s["files"]), units, s["settings"])
        return cls(sources, tree["settings"])

    def check(self, fresh: "Catalog"):
        """Raise ConfigError naming the first file or setting in which `fresh` differs from this, the run's own."""
        _check_settings("data", self.settings, fresh.settings)
        if list(self.sources) != list(fresh.sources):
            raise ConfigError(
                f"data.sources: this run began with {', '.join(self.sources)} and now has {', '.join(fresh.sources)}; "
                "restore them in the same order, or start a new run_dir (weights may change, down to 0)"
            )
        for name, old in self.sources.items():
            _check_source(f"data.sources.{name}", old, fresh.sources[name])
        if self.fingerprint != fresh.fingerprint:
            raise ConfigError(
                "data: the same files are cut in another way than before; use the code that began the run"
            )

    def _tree(self) -> dict:
        sources = [
            {"name": s.name, "settings": s.settings, "files": [asdict(f) for f in s.files], "units": s.units.tolist()}
            for s in self.sources.values()
        ]
        return {"version": _VERSION, "settings": self.settings, "sources": sources}


def build_catalog(data: DataConfig) -> Catalog:
    """List and cut every file of every source.

    Raises ConfigError for a path that matches nothing, a source without text, an unknown or damaged file, or a text
    column that is not there.
    """
    unit_bytes = max(1, data.block_bytes // UNITS_PER_BLOCK)
    sources = {name: _build_source(name, source, unit_bytes) for name, source in data.sources.items()}
    return Catalog(sources, {key: getattr(data, key) for key in _DATA_KEYS})


def _check_source(key: str, old: Source, new: Source):
    _check_settings(key, old.settings, new.settings)
    before, now = ({f.name: f for f in source.files} for source in (old, new))
    for file in sorted(before.keys() | now.keys()):
        if before.get(file) != now.get(file):
            what = "new" if file not in before else "missing" if file not in now else "changed"
            raise ConfigError(f"{key}.paths: {file} is {what} since this run began; undo that, or start a new run_dir")


def _check_settings(key: str, old: dict, new: dict):
    for name in old:
        if old[name] != new.get(name):
            raise ConfigError(
                f"{key}.{name} was {old[name]!r} when this run began and is {new.get(name)!r}; "
                "set it back, or start a new run_dir"
            )


def _build_source(name: str, source: SourceConfig, unit_bytes: int) -> Source:
    key = f"data.sources.{name}.paths"
    found: dict[str, str] = {}
    for pattern in source.paths:
        matches = _match(key, pattern)
        if not matches:
            raise ConfigError(f"{key}: {pattern!r} matches no file; correct it (it is relative to {os.getcwd()})")
        found.update(matches)
    files, units = [], []
    for index, path in enumerate(sorted(found)):
        size, fingerprint = _fingerprint(path)
        layout = layout_of(path)
        files.append(File(path, layout, found[path], size, fingerprint))
        try:
            cuts = cut(path, layout, size, source.text_column, unit_bytes)
        except DAMAGE as error:
            raise damaged(path, error) from error
        units += [(index, *one) for one in cuts]
    if not units:
        raise ConfigError(f"{key}: there is no text in {', '.join(source.paths)}; name files that hold some")
    settings = {k: getattr(source, k) for k in _SOURCE_KEYS}
    return Source(name, tuple(files), np.array(units, np.int64), settings)


def _match(key: str, pattern: str) -> dict[str, str]:
    """Path -> language of every file that `pattern` matches; the language is what `{language}` stands for, or empty."""
    if "://" in pattern:
        raise ConfigError(f"{key}: {pattern!r} is not a local path; mount the bucket, or copy the files")
    parts = pattern.split("/")
    place = parts.index("{language}") if "{language}" in parts else None
    if "{language}" in pattern and (place is None or pattern.count("{language}") > 1 or "**" in parts):
        raise ConfigError(
            f"{key}: {pattern!r}: write {{language}} once, as one whole folder or file name, without '**'"
        )
    wild = pattern.replace("{language}", "*")
    matches = [path for path in glob.glob(wild, recursive=True) if os.path.isfile(path)]
    return {path: "" if place is None else path.split("/")[place] for path in matches}


def _fingerprint(path: str) -> tuple[int, str]:
    """Size, and a digest of it and of both ends of the file: cheap on terabytes, and any rewritten file differs."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = blake2b(str(size).encode(), digest_size=16)
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return size, digest.hexdigest()
