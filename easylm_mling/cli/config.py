"""Configs on the command line: how every verb is given one, and `config`, which explains the keys."""

import argparse
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from easylm_mling.errors import ConfigError

if TYPE_CHECKING:
    from easylm_mling.config import RunConfig


_MERGED = "files merge left to right, then key.path=value"


def add_config(parser: argparse.ArgumentParser, needed: bool = True, help: str = _MERGED):
    """Add the arguments that name a config."""
    parser.add_argument("config", nargs="+" if needed else "*", metavar="CONFIG.yaml|key=value", help=help)


def config_files(a: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the files and the `key.path=value` overrides among the arguments of `add_config`."""
    files = [x for x in a.config if "=" not in x or Path(x).is_file()]
    return files, [x for x in a.config if x not in files]


def load_config(a: argparse.Namespace, *more: str) -> "RunConfig":
    """Load the config that the arguments name, with `more` files merged last. Raises ConfigError."""
    from easylm_mling.run.starting_model import load_config

    files, overrides = config_files(a)
    return load_config([*files, *more], overrides, getattr(a, "override_model", ()))


def add_override_model(parser: argparse.ArgumentParser):
    """Add the argument that insists on another model than the checkpoint's in `init_from`."""
    parser.add_argument(
        "--override-model",
        action="append",
        default=[],
        metavar="KEY,...",
        help="of `model`, or `tokenizer`: train with the config's value although the checkpoint in init_from has another",
    )


def add_verbs(verbs):
    """Add `config` to the parser's `verbs`."""
    config = verbs.add_parser("config", help="what a config key means, its unit and default, and what it affects")
    config.add_argument("key", nargs="?", metavar="KEY", help="such as train.batch_size, or a section (default: all)")
    config.add_argument("--markdown", action="store_true", help="print docs/config.md")
    config.set_defaults(run=_config)


def _config(a) -> int:
    from easylm_mling.config.describe import describe_key, known_keys, markdown

    if a.markdown:
        print(markdown(), end="")
        return 0
    keys, asked = known_keys(), a.key or ""
    wanted = [k for k in keys if not asked or k == asked or k.startswith(f"{asked}.")]
    if not wanted:
        close = difflib.get_close_matches(asked, keys, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`easylm-mling config` lists all keys"
        raise ConfigError(f"unknown key {asked!r}; {hint}")
    if wanted == [asked]:
        print(describe_key(asked))
    else:
        for key in wanted:
            print(f"{key:{max(map(len, wanted))}}  {keys[key].setting.help}")
        if asked in keys and (about := keys[asked].about.partition("\n\n")[2]):
            print(f"\n{about}")
    return 0
