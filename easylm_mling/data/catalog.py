"""The catalog of everything a run reads: its files, and the units that they are cut into.

Built once, kept in the run directory, and compared with the files on every resume: a run whose files changed under it
is refused, because the order of its data would no longer be the order its checkpoint counts in.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import orjson

from easylm_mling.config import DataConfig, SourceConfig, to_tree
from easylm_mling.data.sources.listing import Info, find_files, size_and_fingerprint
from easylm_mling.data.sources.readers import DAMAGE, damaged
from easylm_mling.data.sources.splitting import Cut, cut, layout_of
from easylm_mling.errors import ConfigError
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.files import DEFAULT_RETRY, Retry

UNITS_PER_BLOCK = 4
_VERSION = 1
# Requests under way at a time: a bucket's thousand files are listed and cut in a minute.
_THREADS = 16
# Everything but the files that decides the order of the data; not the weights, which may change during a run.
_DATA_KEYS = ("seed", "block_bytes", "sequence_length")
_SOURCE_KEYS = (
    "text_column",
    "row",
    "holdout_fraction",
    "sample_fraction",
    "max_epochs",
    "language_by",
    "language_temperature",
    "language_max_repeats",
)


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
    `settings` are the values of the source's config that decide the order and content of its documents. `retry` is no
    part of the catalog: it may change between one process and the next.
    """

    name: str
    files: tuple[File, ...]
    units: np.ndarray
    settings: dict
    retry: Retry = field(default=DEFAULT_RETRY, compare=False)

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
        write_atomically(path, orjson.dumps(self._tree()))

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
        """Raise ConfigError naming the first file or setting in which `fresh` differs from this, the run's own.

        Units are not compared: those of the run hold as long as its files do.
        """
        _check_settings("data", self.settings, fresh.settings)
        if list(self.sources) != list(fresh.sources):
            raise ConfigError(
                f"data.sources: this run began with {', '.join(self.sources)} and now has {', '.join(fresh.sources)}; "
                "restore them in the same order, or start a new run_dir (weights may change, down to 0)"
            )
        for name, old in self.sources.items():
            _check_source(f"data.sources.{name}", old, fresh.sources[name])

    def _tree(self) -> dict:
        sources = [
            {"name": s.name, "settings": s.settings, "files": [asdict(f) for f in s.files], "units": s.units.tolist()}
            for s in self.sources.values()
        ]
        return {"version": _VERSION, "settings": self.settings, "sources": sources}


def build_catalog(data: DataConfig) -> Catalog:
    """List and cut every file of every source.

    Raises ConfigError for a path that matches nothing, a source without text, an unknown or damaged file, a text
    column that is not there, or a file that cannot be read.
    """
    unit_bytes = max(1, data.block_bytes // UNITS_PER_BLOCK)
    sources = {name: _cut_source(source, unit_bytes) for name, source in _list_sources(data, {}).items()}
    return Catalog(sources, _settings(data))


def reopen_catalog(stored: Catalog, data: DataConfig) -> Catalog:
    """The catalog a run began with, its cuts included, once its files were found unchanged (by size and fingerprint).

    Raises ConfigError as Catalog.check does.
    """
    stored.check(Catalog(_list_sources(data, stored.sources), _settings(data)))
    retry = Retry(data.retries, data.retry_seconds)
    return replace(stored, sources={name: replace(s, retry=retry) for name, s in stored.sources.items()})


def _settings(data: DataConfig) -> dict:
    return {key: getattr(data, key) for key in _DATA_KEYS}


def _list_sources(data: DataConfig, stored: dict[str, Source]) -> dict[str, Source]:
    """Every source with its files as they are now, and no units."""
    retry = Retry(data.retries, data.retry_seconds)
    listed = {}
    for name, source in data.sources.items():
        known = tuple(f.name for f in stored[name].files) if name in stored else ()
        found = find_files(f"data.sources.{name}", source, retry, known)
        named = [(path, *found[path], retry) for path in sorted(found)]
        files = tuple(_in_parallel(lambda args: _list_file(*args), named))
        listed[name] = Source(name, files, np.zeros((0, 4), np.int64), _source_settings(source), retry)
    return listed


def _source_settings(source: SourceConfig) -> dict:
    settings = {key: getattr(source, key) for key in _SOURCE_KEYS}
    # Not as null where there is none: runs that began before there was such a key must go on.
    return {**settings, "dataset": to_tree(source.dataset)} if source.dataset else settings


def _list_file(path: str, language: str, info: Info, retry: Retry) -> File:
    size, fingerprint = size_and_fingerprint(path, info, retry)
    return File(path, layout_of(path, retry), language, size, fingerprint)


def _cut_source(source: Source, unit_bytes: int) -> Source:
    def cut_file(file: File) -> list[Cut]:
        try:
            return cut(file.name, file.layout, file.size, source.settings["text_column"], unit_bytes, source.retry)
        except DAMAGE as error:
            raise damaged(file.name, error) from error

    cuts = _in_parallel(cut_file, source.files)
    units = [(index, *one) for index, of_file in enumerate(cuts) for one in of_file]
    if not units:
        key = "dataset" if source.settings.get("dataset") else "paths"
        some = ", ".join(f.name for f in source.files[:3]) + (", ..." if len(source.files) > 3 else "")
        raise ConfigError(f"data.sources.{source.name}.{key}: there is no text in {some}; name files that hold some")
    return replace(source, units=np.array(units, np.int64))


def _in_parallel(call, items) -> list:
    """`call` of each item, in their order; the first error in that order is raised, and nothing new begun."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="easylm-catalog") as pool:
        try:
            return list(pool.map(call, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
