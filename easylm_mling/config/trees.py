"""Configs as plain trees: their keys by path, and what differs between two of them."""

import dataclasses
from typing import Any

from easylm_mling.config.basics import Duration, Setting, setting_of


def to_tree(value: Any) -> Any:
    """Return a config as plain dicts, lists and scalars, such that `from_tree(type(c), to_tree(c)) == c`."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_tree(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [to_tree(v) for v in value]
    return value


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A key that is no section: its value, as a plain tree, and its Setting."""

    value: Any
    setting: Setting


def leaves(config: Any, path: str = "", section: Setting | None = None) -> dict[str, Leaf]:
    """Return every leaf of a config by its `key.path`; `section` is the Setting of `config` itself."""
    section = section or Setting()
    if dataclasses.is_dataclass(config) and not isinstance(config, Duration):
        fields = dataclasses.fields(config)
        inner = {f.name: (getattr(config, f.name), setting_of(f).inside(section)) for f in fields}
    elif isinstance(config, dict):
        inner = {name: (value, section) for name, value in config.items()}
    else:
        return {path: Leaf(to_tree(config), section)}
    parts = [leaves(value, join_path(path, name), known) for name, (value, known) in inner.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value differs between two configs; None is the value where one of them lacks it."""

    key: str
    old: Any
    new: Any
    setting: Setting


def differences(old: Any, new: Any) -> list[Change]:
    """Return every key whose value differs between two configs, in alphabetical order."""
    a, b = leaves(old), leaves(new)
    changes = []
    for key in sorted(a.keys() | b.keys()):
        values = [side[key].value if key in side else None for side in (a, b)]
        if values[0] != values[1]:
            changes.append(Change(key, *values, setting=(b.get(key) or a[key]).setting))
    return changes


def step_settings(train: Any) -> dict[str, Any]:
    """Return the settings of a TrainConfig that the compiled step, or a bit that it computes, depends on."""
    return {key: leaf.value for key, leaf in leaves(train).items() if not leaf.setting.outside_step}


def join_path(path: str, key: object) -> str:
    """Return the path of `key` in the section `path`; "" is the whole config."""
    return f"{path}.{key}" if path else str(key)
