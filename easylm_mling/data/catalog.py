"""The catalog of everything a run reads: its files, and the units that they are cut into.

It is built once, kept in the run directory, and compared with the files on every resume. A run whose files have changed
is refused: its checkpoint counts in an order that no longer exists.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import orjson

from easylm_mling.config import ConversationConfig, DataConfig, SourceConfig, from_tree, to_tree
from easylm_mling.data.conversations.templates import read_template
from easylm_mling.data.sources.lines import DAMAGE
from easylm_mling.data.sources.listing import Info, find_files, has_changed, left_out_text, size_and_fingerprint
from easylm_mling.data.sources.readers import damaged
from easylm_mling.data.sources.splitting import Cut, cut, layout_of
from easylm_mling.errors import ConfigError, check_format
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.files import DEFAULT_RETRY, Retry, is_remote, stamp

UNITS_PER_BLOCK = 4
_FORMAT = 3
# From this format on lanes share units where whole ones would be uneven. A run keeps to how it began.
SHARES_UNITS = 3
_FORMATS = (2, _FORMAT)
# A source of at least so many bytes has units for hundreds of lanes, but none so small that reading it is slow. A smaller
# one is pooled (data/pool.py).
_SMALL_BYTES, _FINE_UNITS, _FINEST_UNIT = 16_000_000, 8192, 16_384
# Requests in flight at a time: a bucket's thousand files are listed and cut in a minute.
_THREADS = 16
# The settings that decide the order of the data. Weights are not among them: they may change during a run.
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
    "dataset",
)
# Among a source's settings: the largest holdout_fraction of all sources, which decides what none of them is trained on.
RUN_HOLDOUT = "run_holdout_fraction"


@dataclass(frozen=True)
class File:
    """One listed file. `name` is relative if the config's path is; `size` is in bytes."""

    name: str
    layout: str
    language: str
    size: int
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """The files and units of one source.

    `units` is int64 [units, 4]: index into `files`, first position, position after the last, estimated bytes of text.
    `settings` are those of the source's config that decide the order and content of its documents. `dealing`, the format
    of the catalog, says how units are dealt to lanes. Not saved is what
    may differ from process to process: `retry`, `stamps`, each local file's size and time as it was listed, and
    `left_out`, the names of files beside the source's own that are not read.
    """

    name: str
    files: tuple[File, ...]
    units: np.ndarray
    settings: dict
    retry: Retry = field(default=DEFAULT_RETRY, compare=False)
    stamps: tuple[str, ...] = field(default=(), compare=False)
    left_out: tuple[str, ...] = field(default=(), compare=False)
    dealing: int = field(default=_FORMAT, compare=False)

    @cached_property
    def languages(self) -> tuple[str, ...]:
        """The languages' names, sorted; one empty name if the paths have no `{language}`."""
        return tuple(sorted({f.language for f in self.files}))

    @cached_property
    def unit_languages(self) -> np.ndarray:
        """Each unit's index into `languages`, int64 [units]."""
        of_file = np.array([self.languages.index(f.language) for f in self.files], np.int64)
        return of_file[self.units[:, 0]]

    def check_file(self, index: int):
        """Raise ConfigError if the file is not the one that was listed when this process began."""
        file = self.files[index]
        if is_remote(file.name):
            changed = has_changed(file.name, file.size, file.fingerprint, self.retry)
        else:
            now = stamp(file.name)  # none if it is gone, which reading says better
            changed = bool(now and self.stamps) and now != self.stamps[index]
        if changed:
            raise ConfigError(
                f"{file.name}: was changed while the run read it; restore it and run again, or start a new run_dir"
            )


@dataclass(frozen=True)
class Catalog:
    """All sources of a run, in the order of the config."""

    sources: dict[str, Source]
    settings: dict

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest (128 bits) of everything that decides which document comes when."""
        return blake2b(orjson.dumps(self._tree()), digest_size=16).hexdigest()

    def remarks(self) -> list[str]:
        """Return a line about each source whose folders hold files that are not read."""
        sources = [s for s in self.sources.values() if s.left_out]
        return [f"data.sources.{s.name}.paths: {left_out_text(s.left_out)}" for s in sources]

    def save(self, path: str | Path):
        """Write the catalog as JSON, atomically."""
        number = min((s.dealing for s in self.sources.values()), default=_FORMAT)
        write_atomically(path, orjson.dumps({"format": number, **self._tree()}))

    @classmethod
    def load(cls, path: str | Path) -> "Catalog":
        """Read what `save` wrote; raises ConfigError if the file is missing, damaged or of an unknown format."""
        try:
            tree = orjson.loads(Path(path).read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise ConfigError(
                f"{path}: not a readable catalog ({error}); restore it, or start a new run_dir"
            ) from error
        number = tree.get("format") if isinstance(tree, dict) else None
        check_format(path, "catalog", _FORMAT if number in _FORMATS else number, _FORMAT, "start a new run_dir")
        sources = {}
        for s in tree["sources"]:
            units = np.array(s["units"], np.int64).reshape(-1, 4)
            files = tuple(File(**f) for f in s["files"])
            sources[s["name"]] = Source(s["name"], files, units, s["settings"], dealing=tree["format"])
        return cls(sources, tree["settings"])

    def check(self, fresh: "Catalog"):
        """Raise ConfigError, naming the first file or setting in which `fresh` differs from this, the run's own.

        Units are not compared: while the files are the same, the run's cuts hold.
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
        return {"settings": self.settings, "sources": sources}


def build_catalog(data: DataConfig) -> Catalog:
    """List and cut every file of every source.

    Raises ConfigError for a path without a match, a source without text, a missing text column, and a file that is
    damaged, unreadable or of an unknown kind.
    """
    sources = {
        name: _cut_source(source, _unit_bytes(source, data.block_bytes))
        for name, source in _list_sources(data, {}).items()
    }
    return Catalog(sources, _settings(data))


def _unit_bytes(source: Source, block_bytes: int) -> int:
    """Return the size of the source's units: a part of a block, and less where the lanes would have too few of them."""
    size = sum(f.size for f in source.files)
    fine = max(_FINEST_UNIT, size // _FINE_UNITS) if size > _SMALL_BYTES else block_bytes
    return max(1, min(block_bytes // UNITS_PER_BLOCK, fine))


def reopen_catalog(stored: Catalog, data: DataConfig) -> Catalog:
    """Return the run's catalog, with the cuts it began with, after a check of its files by size and fingerprint.

    Raises ConfigError as Catalog.check does, and for files that cannot be listed.
    """
    now = Catalog(_list_sources(data, stored.sources), _settings(data))
    stored.check(now)
    olds = stored.sources
    sources = {n: replace(s, units=olds[n].units, dealing=olds[n].dealing) for n, s in now.sources.items()}
    return replace(now, sources=sources)


def _settings(data: DataConfig) -> dict:
    return {key: getattr(data, key) for key in _DATA_KEYS}


def _list_sources(data: DataConfig, stored: dict[str, Source]) -> dict[str, Source]:
    """Return every source with its files as they are now, and no units."""
    retry = Retry(data.retries, data.retry_seconds)
    strictest = max((source.holdout_fraction for source in data.sources.values()), default=0.0)
    listed = {}
    for name, source in data.sources.items():
        stored_names = tuple(f.name for f in stored[name].files) if name in stored else ()
        matches, left_out = find_files(f"data.sources.{name}", source, retry, stored_names)
        stamps = tuple(stamp(path) for path in sorted(matches))
        arguments = [(path, *matches[path], retry) for path in sorted(matches)]
        files = tuple(_in_parallel(lambda of_file: _list_file(*of_file), arguments))
        settings = {key: to_tree(getattr(source, key)) for key in _SOURCE_KEYS} | {RUN_HOLDOUT: strictest}
        settings |= _conversation_settings(f"data.sources.{name}.conversations", source, data)
        no_units = np.zeros((0, 4), np.int64)
        listed[name] = Source(name, files, no_units, settings, retry, stamps, tuple(left_out))
    return listed


def _conversation_settings(key: str, source: SourceConfig, data: DataConfig) -> dict:
    """Return what decides a conversation's tokens, the whole template included; nothing for a source of texts."""
    if source.conversations is None:
        return {}
    template = read_template(source.conversations, data.tokenizer, key)
    tree = {"config": to_tree(source.conversations), "template": template, "length": data.sequence_length}
    return {"conversations": tree}


def _list_file(path: str, language: str, info: Info, retry: Retry) -> File:
    size, fingerprint = size_and_fingerprint(path, info, retry)
    return File(path, layout_of(path, retry), language, size, fingerprint)


def _cut_source(source: Source, unit_bytes: int) -> Source:
    columns, setting = (source.settings["text_column"],), "text_column"
    if "conversations" in source.settings:
        config = from_tree(ConversationConfig, source.settings["conversations"]["config"])
        columns, setting = config.columns, f"conversations.keys.{next(iter(config.names))}"

    def cut_file(file: File) -> list[Cut]:
        try:
            return cut(file.name, file.layout, file.size, columns, unit_bytes, source.retry, setting)
        except DAMAGE as error:
            raise damaged(file.name, error) from error

    cuts = _in_parallel(cut_file, source.files)
    units = [(index, *unit) for index, of_file in enumerate(cuts) for unit in of_file]
    if not units:
        key = "dataset" if source.settings["dataset"] else "paths"
        names = ", ".join(f.name for f in source.files[:3]) + (", ..." if len(source.files) > 3 else "")
        raise ConfigError(f"data.sources.{source.name}.{key}: there is no text in {names}; name files that hold some")
    return replace(source, units=np.array(units, np.int64))


def _in_parallel(call, items) -> list:
    """Call `call` with each item; returns the results in order, or raises the first error and drops the items that wait."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="easylm-catalog") as pool:
        return list(pool.map(call, items))


def _check_source(key: str, old: Source, new: Source):
    _check_settings(key, old.settings, new.settings)
    before, now = ({f.name: f for f in source.files} for source in (old, new))
    for file in sorted(before.keys() | now.keys()):
        if before.get(file) != now.get(file):
            what = "new" if file not in before else "missing" if file not in now else "changed"
            raise ConfigError(f"{key}.paths: {file} is {what} since this run began; undo that, or start a new run_dir")


def _check_settings(key: str, old: dict, new: dict):
    for name in sorted(old.keys() | new.keys()):
        if name == "conversations" and old.get(name) != new.get(name):
            raise ConfigError(
                f"{key}.conversations or its template is not the one that this run began with; set it back, or start a new "
                "run_dir"
            )
        # What follows from other settings is not named: one of those differs, too.
        if name != RUN_HOLDOUT and name in old and old[name] != new[name]:
            raise ConfigError(
                f"{key}.{name} was {old[name]!r} when this run began and is {new[name]!r}; "
                "set it back, or start a new run_dir"
            )
