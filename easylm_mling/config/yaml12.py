"""YAML as version 1.2 has it, with nothing lost: `no` is a text, a key is the text that is written, and octal is refused.

Source: YAML 1.2.2, 10.3.2 (the tags of the core schema). PyYAML reads 1.1, where `no` is false and 017 is 15.
"""

import re
from typing import Any

import yaml

from easylm_mling.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_OCTAL = re.compile(r"[-+]?0(?:[0-9_]+|o[0-7]+)")
# Above what any config of ours needs; aliases can make a small file stand for billions.
_MOST_NODES = 10_000


def read_yaml(text: str | bytes) -> Any:
    """Return what YAML `text` holds, as dicts with text keys, lists and scalars.

    A number that is not written as Python writes it (1e9, 1_000) stays text, so that a path or a name is what was written.
    Raises ConfigError for octal numbers, and yaml.YAMLError for bad YAML, a key that stands twice, and aliases that expand to
    too much.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def write_yaml(tree: Any) -> str:
    """Return a plain tree as YAML, such that `read_yaml` and readers of YAML 1.1 understand it alike."""
    return yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}

    def construct_document(self, node):
        try:
            _expanded_size(node, {})
        except RecursionError:
            raise yaml.constructor.ConstructorError(None, None, "its aliases nest too deep", node.start_mark) from None
        return super().construct_document(node)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen and key.tag != f"{_TAG}merge":
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_int(self, node) -> int | str:
        text = self.construct_scalar(node)
        return int(text) if str(_whole(text)) == text else text

    def construct_real(self, node) -> float | str:
        text = self.construct_scalar(node)
        special = text.lower().lstrip("+-") in (".inf", ".nan")
        value = float(text.replace(".", "", 1)) if special else float(text)
        # PyYAML writes 1e-05 as 1.0e-05.
        return value if special or text in (repr(value), repr(value).replace("e", ".0e")) else text

    def refuse_octal(self, node):
        text = self.construct_scalar(node)
        plain = text.lstrip("+-0o_") or "0"
        raise ConfigError(
            f"line {node.start_mark.line + 1}: {text} may be meant as octal; write {plain}, or '{text}' in quotes for a text"
        )


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data) -> bool:
        return True


def _whole(text: str) -> int | None:
    return int(text) if len(text) < 4000 else None  # Python refuses to read more digits


def _quote_numbers(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    number = any(p.fullmatch(text) for p in (_INTEGER, _FLOAT, _OCTAL))
    return dumper.represent_scalar(f"{_TAG}str", text, style="'" if number else None)


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the nodes that `node` stands for with its aliases followed; raises ConstructorError for too many."""
    if id(node) not in sizes:
        sizes[id(node)] = 1 << 62  # while it is being counted: an alias to it from within is endless
        size = 1
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            size += sum(_expanded_size(n, sizes) for n in (child if isinstance(child, tuple) else (child,)))
            if size > _MOST_NODES:
                raise yaml.constructor.ConstructorError(None, None, "its aliases stand for too much", node.start_mark)
        sizes[id(node)] = size
    return sizes[id(node)]


# The first that matches counts.
for _tag, _pattern, _first in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("octal", _OCTAL, list("-+0")),
    ("int", _INTEGER, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"(?:{_pattern.pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}octal", _Loader.refuse_octal)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_real)
_Dumper.add_representer(str, _quote_numbers)
