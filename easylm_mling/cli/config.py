"""Configs on the command line: how every verb is given one, and `config`, which explains the keys."""

import argparse
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from easylm_mling.errors import ConfigError

if TYPE_CHECKING:
    from easylm_mling.config import RunConfig


def add_config(
    parser: argparse.ArgumentParser, needed: bool = True, help: str = "files merge left to right, then keys"
):
    """Add the arguments that name a config."""
    parser.add_argument("config", nargs="+" if needed else "*", metavar="CONFIG.yaml|key=value", help=help)


def config_files(a: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The files and the `key.path=value` overrides among the arguments of `add_config`."""
    files = [x for x in a.config if "=" not in x or Path(x).is_file()]
    return files, [x for x in a.config if x not in files]


def load_config(a: argparse.Namespace, *more: str) -> "RunConfig":
    """The config that the arguments, and `more` files, say. Raises ConfigError."""
    from easylm_mling.config import load

    files, overrides = config_files(a)
    return load([*files, *more], overrides)


def add_verbs(verbs):
    config = verbs.add_parser("config", help="what a config key means, its unit and default, and what it affects")
    config.add_argument("key", nargs="?", metavar="KEY", help="such as train.batch_size, or a section (default: all)")
    config.add_argument("--markdown", action="store_true", help="print docs/config.md")
    config.set_defaults(run=_config)


def _config(a) -> int:
    from easylm_mling.config.describe import describe_key, known_keys, markdown

    if a.markdown:
        print(markdown(), end="")
        return 0
    keys = known_keys()
    wanted = [k for k in keys if a.key is None or k == a.key or k.startswith(f"{a.key}.")]
    if not wanted:
        close = difflib.get_close_matches(a.key, keys, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`easylm-mling config` lists all keys"
        raise ConfigError(f"unknown key {a.key!r}; {hint}")
    if wanted == [a.key]:
        print(describe_key(a.key))
    else:
        for key in wanted:
            print(f"{key:40} {keys[key].setting.help}")
    return 0
