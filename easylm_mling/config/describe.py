"""Descriptions of config keys, from the dataclasses themselves: for `easylm-mling config` and docs/config.md."""

import dataclasses
import types
import typing

from easylm_mling.config.basics import Duration, Setting, setting_of
from easylm_mling.config.loading import to_tree
from easylm_mling.config.run import RunConfig


@dataclasses.dataclass(frozen=True)
class Key:
    """One config key: its type as text, its default as text ("" if it must be given), and its Setting."""

    kind: str
    default: str
    setting: Setting


def known_keys(schema: typing.Any = RunConfig, path: str = "", section: Setting | None = None) -> dict[str, Key]:
    """Every key by its path; NAME stands for a source's name."""
    keys: dict[str, Key] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, known = f"{path}{field.name}", setting_of(field).inside(section or Setting())
        kind, inner = hints[field.name], _dataclass_in(hints[field.name])
        keys[name] = Key(_kind_text(kind), _default_text(field), known)
        if inner:
            part = {dict: ".NAME", tuple: "[i]"}.get(typing.get_origin(kind), "")
            keys |= known_keys(inner, f"{name}{part}.", known)
    return keys


def describe_key(key: str) -> str:
    """What a person wants to know of one key, in a few lines."""
    known = known_keys()[key]
    unit = f", in {known.setting.unit}" if known.setting.unit else ""
    default = f"default: {known.default}" if known.default else "must be given"
    return f"{key}: {known.setting.help}\n  {known.kind}{unit}; {default}\n  {change_text(known.setting)}"


def change_text(setting: Setting) -> str:
    """What a resumed run lets one do with a key."""
    if setting.free:
        return "may change when a run resumes"
    if setting.data:
        return "may change when a run resumes with --accept-data-change"
    return "is fixed for a run's life" + (f": {setting.reason}" if setting.reason else "")


def markdown() -> str:
    """docs/config.md: a table of every section."""
    lines = [
        "# Config keys",
        "",
        "Made by `easylm-mling config --markdown`. A config is YAML files, merged left to right, then `key.path=value`",
        "arguments. `easylm-mling config KEY` explains one key. *On resume*: yes, or *data* for `--accept-data-change`.",
    ]
    sections: dict[str, list[str]] = {}
    for name, key in known_keys().items():
        change = "yes" if key.setting.free else "*data*" if key.setting.data else ""
        help_text = (key.setting.help + (f" ({key.setting.unit})" if key.setting.unit else "")).replace("|", "\\|")
        row = f"| `{name}` | {key.kind} | {key.default and f'`{key.default}`'} | {change} | {help_text} |"
        sections.setdefault(name.rpartition(".")[0], []).append(row)
    for section, rows in sections.items():
        lines += [
            "",
            f"## {section or 'The run'}",
            "",
            "| key | type | default | on resume | meaning |",
            "|---|---|---|---|---|",
            *rows,
        ]
    return "\n".join(lines) + "\n"


def _dataclass_in(kind):
    """The dataclass that a value of this type holds, itself or as the items of a list or dict; None if it holds none."""
    options = [kind, *typing.get_args(kind)]
    return next((k for k in options if dataclasses.is_dataclass(k) and k is not Duration), None)


def _kind_text(kind) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else _kind_text(a) for a in arguments)
    if origin is tuple:
        return f"list of {_kind_text(arguments[0])}"
    if origin is dict:
        return f"{_kind_text(arguments[1])} by name"
    if kind is Duration:
        return "length"
    if dataclasses.is_dataclass(kind):
        return "section"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[kind]


def _default_text(field: dataclasses.Field) -> str:
    if (
        field.default is dataclasses.MISSING
        or dataclasses.is_dataclass(field.default)
        and not isinstance(field.default, Duration)
    ):
        return ""
    value = to_tree(field.default)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
