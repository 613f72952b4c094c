"""Paths as people write them: the one place that knows what a `~` is."""

import os
from typing import Any

from easylm_mling.errors import check


def expanded(path: Any) -> Any:
    """Return a path with the home directory for a `~` or `~user` at its beginning; of a list, each of its paths.

    Raises ConfigError where there is no such home. Other values stay as they are.
    """
    if isinstance(path, (list, tuple)):
        return type(path)(expanded(p) for p in path)
    if not isinstance(path, str) or not path.startswith("~"):
        return path
    home = os.path.expanduser(path)
    check(
        not home.startswith("~"),
        f"{path}: there is no home directory of this name; write the whole path, or ./{path} for a name that begins with ~",
    )
    return home
