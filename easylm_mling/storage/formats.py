"""The `format` number that our files carry: one that this version does not know is refused by name, and never guessed at."""

from pathlib import Path

from easylm_mling.errors import ConfigError


def unknown_format(path: str | Path, number: object, known: int, otherwise: str) -> ConfigError:
    """Return the error for a file whose format is `number` (None: it has none) and not `known`.

    `otherwise` is the way out where the version that wrote the file is not at hand.
    """
    has = "no format number" if number is None else f"format {number}"
    return ConfigError(
        f"{path}: has {has}, and this version of easylm_mling knows only {known}; use the version that wrote it, or {otherwise}"
    )
