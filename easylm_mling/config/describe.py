"""Descriptions of config keys, from the dataclasses themselves: for `easylm-mling config` and docs/config.md."""

import dataclasses
import inspect
import textwrap
import types
import typing

from easylm_mling.config.basics import Duration, Setting, setting_of
from easylm_mling.config.run import RunConfig
from easylm_mling.config.trees import to_tree


@dataclasses.dataclass(frozen=True)
class Key:
    """One config key: its type and default as text, its Setting, and of a section its docstring."""

    kind: str
    default: str | None  # None if the key must be given, "" for a section
    setting: Setting
    about: str = ""


def known_keys(schema: typing.Any = RunConfig, path: str = "", section: Setting | None = None) -> dict[str, Key]:
    """Return every key by its path, where NAME stands for a source's name; `section` is the Setting of `schema` itself."""
    keys: dict[str, Key] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, known = f"{path}{field.name}", setting_of(field).inside(section or Setting())
        kind, inner = hints[field.name], _dataclass_in(hints[field.name])
        keys[name] = Key(_kind_text(kind), _default_text(field), known, inspect.getdoc(inner) or "" if inner else "")
        if inner:
            part = {dict: ".NAME", tuple: "[i]"}.get(typing.get_origin(kind), "")
            keys |= known_keys(inner, f"{name}{part}.", known)
    return keys


def describe_key(key: str) -> str:
    """Return the help of one key, its type, unit, default and what it affects, in a few lines."""
    known = known_keys()[key]
    unit = f", in {known.setting.unit}" if known.setting.unit else ""
    default = "must be given" if known.default is None else f"default: {known.default}"
    lines = textwrap.wrap(f"{key}: {known.setting.help}", 100, break_on_hyphens=False)
    return "\n  ".join([*lines, f"{known.kind}{unit}; {default}", effect_text(known.setting)])


def effect_text(setting: Setting) -> str:
    """Return in words what a key affects: whether it may change on resume, and whether the step depends on it."""
    if setting.free:
        return "may change when a run resumes" + ("; the step does not depend on it" if setting.outside_step else "")
    if setting.data:
        return "may change when a run resumes with --accept-data-change"
    if setting.change:
        return "may change when a run resumes with --change KEY=VALUE"
    return "is fixed for a run's life" + (f": {setting.reason}" if setting.reason else "")


def markdown() -> str:
    """Return docs/config.md: a table for each section."""
    lines = [
        "# Config keys",
        "",
        "Made by `easylm-mling config --markdown`. A config is YAML files, merged left to right, then `key.path=value`",
        "arguments. `easylm-mling config KEY` explains one key. *On resume*: yes, *data* for `--accept-data-change`,",
        "or *change* for `--change`.",
    ]
    keys, sections = known_keys(), dict[str, list[str]]()
    for name, key in keys.items():
        change = (
            "yes" if key.setting.free else "*data*" if key.setting.data else "*change*" if key.setting.change else ""
        )
        help_text = (key.setting.help + (f" ({key.setting.unit})" if key.setting.unit else "")).replace("|", "\\|")
        row = f"| `{name}` | {key.kind} | {_default_cell(key.default)} | {change} | {help_text} |"
        sections.setdefault(name.rpartition(".")[0], []).append(row)
    for section, rows in sections.items():
        about = (
            keys[section.removesuffix("[i]").removesuffix(".NAME")].about if section else "The top level of a config."
        )
        lines += [
            "",
            f"## {section or 'The run'}",
            "",
            *about.splitlines(),
            "",
            "| key | type | default | on resume | meaning |",
            "|---|---|---|---|---|",
            *rows,
        ]
    return "\n".join(lines) + "\n"


def _dataclass_in(kind):
    """Return the dataclass that `kind` is, or a list or dict of them holds; None if neither."""
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


def _default_text(field: dataclasses.Field) -> str | None:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, Duration):
        return ""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(to_tree(value)) or "''"


def _default_cell(default: str | None) -> str:
    return "required" if default is None else default and f"`{default}`"
