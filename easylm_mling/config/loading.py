"""Configs from YAML files and arguments, strictly, and back to YAML."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from easylm_mling.config.basics import Duration, setting_of
from easylm_mling.config.paths import expanded
from easylm_mling.config.run import MixerConfig, RunConfig
from easylm_mling.config.trees import join_path, to_tree
from easylm_mling.config.yaml12 import read_yaml, write_yaml
from easylm_mling.errors import ConfigError, check, one_line

Schema = typing.TypeVar("Schema")


def load(
    files: list[str], overrides: Sequence[str] = (), complete: Callable[[dict], dict] = lambda tree: tree
) -> RunConfig:
    """Merge YAML `files` left to right, then `key.path=value` overrides.

    For example `load(["configs/demo.yaml"], ["train.seed=1"])`. Raises ConfigError for a missing file, bad YAML, an unknown
    or missing key, or a value of the wrong type. `complete` is given the merged tree, and returns it with more in it.
    """
    return _build(RunConfig, complete(_merged(files, overrides)), "")


def load_kept(file: Path) -> RunConfig:
    """Load the config that a run has kept; raises ConfigError that names the run's own file, and a way out, if it is damaged."""
    try:
        return load([str(file)])
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: the run's own config is damaged, not yours ({one_line(error)}); restore it from a backup, or from the "
            "`config` in the info of a checkpoint"
        ) from None


def load_mixer(files: list[str], overrides: Sequence[str] = ()) -> MixerConfig:
    """Load the mixer's part of a config that needs no section but `data`; a section that is there is checked.

    Without `train.budget_tokens` the budget is 0: not known. Raises ConfigError as `load` does.
    """
    tree = _merged(files, overrides)
    fields = {f.name: f for f in dataclasses.fields(RunConfig)}
    if all(name in tree for name, f in fields.items() if f.default is dataclasses.MISSING):
        return _build(RunConfig, tree, "").mixer
    _check_known(tree, fields, "")
    check("data" in tree, "data is missing; add it to the config")
    given = tree.get("train", {})
    # TrainConfig must have a budget; this one counts for nothing.
    is_open = isinstance(given, dict) and not (given.get("budget_tokens") or given.get("budget_epochs"))
    tree["train"] = {**given, "budget_tokens": 1} if is_open else given
    hints = typing.get_type_hints(RunConfig)
    sections = {name: _build(hints[name], value, name) for name, value in tree.items()}
    data, train = sections["data"], sections["train"]
    return MixerConfig(data, train.batch_size, 0 if is_open else train.budget_tokens, train.budget_epochs)


def _merged(files: list[str], overrides: Sequence[str]) -> dict:
    """Return the plain tree of a config, its groups of sources flattened."""
    tree: dict = {}
    for name in files:
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such config file")
        try:
            _check_harmless(name)
            part = _read(name)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: cannot be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(part, dict):
            raise ConfigError(f"{name}: expected `key: value` lines at the top level")
        tree = _merge(tree, part)
    for item in overrides:
        if not re.match(r"[\w.-]+=", item):
            raise ConfigError(f"{item!r} is not an override; write key.path=value")
        key, _, text = item.partition("=")
        part = _override(key, text)
        for name in reversed(key.split(".")):
            part = {name: part}
        tree = _merge(tree, part)
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("sources"), dict):
        data["sources"] = _flat_sources(data["sources"], "data.sources")
        _set_epochs(tree, data["sources"])
    return tree


def _merge(old: typing.Any, new: typing.Any) -> typing.Any:
    """Return `old` with what `new` has: sections key by key, everything else whole. Nothing is resolved.

    So `${...}` in somebody's config, which may name a secret, stays the text that it is.
    """
    if not isinstance(new, dict):
        return new
    kept = old if isinstance(old, dict) else {}
    return {**kept, **{key: _merge(kept.get(key), value) for key, value in new.items()}}


def _read(name: str) -> typing.Any:
    try:
        tree = read_yaml(Path(name).read_bytes())
    except ConfigError as error:
        raise ConfigError(f"{name}, {error}") from None
    return {} if tree is None else tree


def _override(key: str, text: str):
    """Return an override's value: by YAML, but a text as it stands.

    YAML would end a path at ` #`, and fold its line breaks.
    """
    try:
        value = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{key}={text}: {str(error).partition(': ')[2]}") from None
    except yaml.YAMLError:
        return text  # `*.txt`, say
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return value if quoted or value is None or isinstance(value, (bool, int, float, list, dict)) else text


def _check_harmless(name: str):
    """Raise ConfigError for a file that is made to hurt its reader, before any value is built.

    The loader does not know tags that would run code, and bounds what aliases grow to.
    """
    check(Path(name).stat().st_size <= 1_000_000, f"{name}: over 1 MB, which no config is; is it the right file?")
    depth = 0
    # Reading events does not recurse. Building values does, and a hundred thousand brackets would kill it.
    for event in yaml.parse(Path(name).read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        long = isinstance(event, yaml.ScalarEvent) and len(event.value) > 2000
        if depth > 20 or long:
            what = "a value of over 2000 letters" if long else "more than 20 levels"
            raise ConfigError(
                f"{name}, line {event.start_mark.line + 1}: {what}, which no setting has; is it the right file?"
            )


def _set_epochs(tree: typing.Any, sources: dict):
    """Write `train.budget_epochs` into the sources that do not say how often they are read."""
    if isinstance(train := tree.get("train"), dict) and train.get("budget_epochs"):
        epochs = _build(int, train["budget_epochs"], "train.budget_epochs")
        for source in (s for s in sources.values() if isinstance(s, dict) and s.get("weight") != 0 and epochs > 0):
            source.update({"max_epochs": epochs, "when_used_up": "redistribute", **source})


def _flat_sources(sources: dict, path: str) -> dict:
    """Replace groups by their members: `g: {weight: w, sources: {a: ...}}` becomes `g/a`, with its part of w."""
    flat = {}
    for name, entry in sources.items():
        if not (isinstance(entry, dict) and "sources" in entry):
            flat[str(name)] = entry
            continue
        key = f"{path}.{name}"
        unknown = [k for k in entry if k not in ("weight", "sources")]
        check(
            not unknown,
            f"unknown key '{key}.{''.join(map(str, unknown[:1]))}'; a group has only 'weight' and 'sources'",
        )
        check(isinstance(entry["sources"], dict) and bool(entry["sources"]), f"{key}.sources: name at least one source")
        members = _flat_sources(entry["sources"], f"{key}.sources")
        for member, settings in members.items():
            check(
                isinstance(settings, dict), f"{key}.sources.{member}: expected `key: value` lines, found {settings!r}"
            )
        given = [m for m, settings in members.items() if settings.get("weight") is not None]
        if entry.get("weight") is None:
            check(not given, f"{key}.weight is missing; add it, or remove the weights inside")
        else:
            missing = [m for m in members if m not in given]
            check(not missing, f"{key}.sources.{''.join(missing[:1])}.weight is missing; add it to the config")
            whole = _build(float, entry["weight"], f"{key}.weight")
            parts = {m: _build(float, members[m]["weight"], f"{key}.sources.{m}.weight") for m in members}
            check(
                all(math.isfinite(x) and x >= 0 for x in [whole, *parts.values()]) and sum(parts.values()) > 0,
                f"{key}: weights must be finite numbers, zero or more, and not all 0",
            )
            total = sum(parts.values())
            members = {m: {**settings, "weight": whole * parts[m] / total} for m, settings in members.items()}
        flat.update({f"{name}/{member}": settings for member, settings in members.items()})
    return flat


def from_tree(schema: type[Schema], tree: dict) -> Schema:
    """Build the dataclass `schema` from plain dicts; raises ConfigError as `load` does."""
    return _build(schema, tree, "")


def build_key(schema: type, key: str, value: typing.Any, path: str) -> typing.Any:
    """Build the one setting `key` of the dataclass `schema`; raises ConfigError that names `path`.`key`."""
    return _build(typing.get_type_hints(schema)[key], value, join_path(path, key))


def to_yaml(config) -> str:
    """Return a config as YAML, such that `load` reads it back."""
    return write_yaml(to_tree(config))


def _build(kind, value, path) -> typing.Any:
    """Return `value` (plain YAML) as an instance of the annotated type `kind`; raises ConfigError that names `path`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(next(a for a in args if a is not type(None)), value, path)
    if kind is Duration:
        return _duration(value, path)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    if origin is dict:
        check(isinstance(value, dict), f"{path}: expected `name: ...` entries, found {value!r}")
        # Compiler flags are text, `true` too.
        texts = {k: str(v).lower() if args[1] is str and isinstance(v, bool) else v for k, v in value.items()}
        return {str(k): _build(args[1], v, f"{path}.{k}") for k, v in texts.items()}
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_build(args[0], v, f"{path}[{i}]") for i, v in enumerate(items))
    if kind is bool:
        check(isinstance(value, bool), f"{path}={value!r} must be true or false")
        return value
    if kind is int:
        return _integer(value, path)
    if kind is float:
        return _number(value, path)
    check(kind is str, f"{path}: no rule for {kind}")
    check(isinstance(value, (str, int, float)) and not isinstance(value, bool), f"{path}={value!r} must be text")
    check("\0" not in str(value), f"{path}={value!r} holds a NUL character; remove it")
    check("${" not in str(value), f"{path}={value!r}: ${{...}} is not filled in here; write the value itself")
    return str(value)


def _build_dataclass(kind, value, path):
    listed = f"; `easylm-mling config {path}` lists the keys" if path else ""
    check(isinstance(value, dict), f"{path or 'config'}: expected `key: value` lines, found {value!r}{listed}")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    _check_known(value, fields, path)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        check(name in value or not required, f"{join_path(path, name)} is missing; add it to the config")
    values = {k: _build(hints[k], v, join_path(path, k)) for k, v in value.items()}
    return kind(**{k: expanded(v) if setting_of(fields[k]).path else v for k, v in values.items()})


def _check_known(tree: dict, fields: dict, path: str):
    """Raise ConfigError that names the first key of `tree` that is not among `fields`, and the nearest field."""
    for key in tree:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {join_path(path, key)!r}; {hint}")


def _number(value, path) -> float:
    try:
        return float("not a number" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{path}={repr(value)[:100]} must be a number") from None


_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _integer(value, path) -> int:
    """Return an integer of 64 bits from `4096`, `1_000_000`, `100e9` or `100B`."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif re.fullmatch(r"0x[\da-fA-F]+", str(value)):
        number = int(str(value), 16)
    else:
        match = re.fullmatch(r"(?!-?0[\d_])([-+]?[\d_]*\.?\d+(?:[eE]\+?\d+)?)\s*([KMBT]?)", str(value).strip())
        exact = float(match[1].replace("_", "")) * _SCALE[match[2]] if match else math.nan
        check(
            math.isfinite(exact) and exact == int(exact) and not isinstance(value, bool),
            f"{path}={'inf' if exact == math.inf else repr(value)[:100]} must be a whole number such as 4096, 1_000_000 or 100B",
        )
        number = int(exact)
    check(
        -(1 << 63) <= number < 1 << 63,
        f"{path} must be a whole number of at most 64 bits, and has {number.bit_length()}",
    )
    return number


def _duration(value, path) -> Duration:
    match = re.fullmatch(r"(\S+)\s+(steps?|tokens?)", str(value).strip())
    if match is None:
        raise ConfigError(f"{path}={value!r} must be a length such as '2000 steps' or '1B tokens'")
    amount = _integer(match[1], path)
    check(amount >= 0, f"{path}={value!r} must not be negative")
    return Duration(amount, match[2].rstrip("s") + "s")
