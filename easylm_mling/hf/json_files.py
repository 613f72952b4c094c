"""JSON files of a Hugging Face directory."""

from pathlib import Path

import orjson

from easylm_mling.errors import ConfigError


def read_json(path: Path) -> dict:
    """Read a JSON object from a file; raises ConfigError if it is missing or anything else."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name a complete Hugging Face model directory")
    try:
        tree = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object; download it again")
    return tree


def write_json(path: Path, tree: dict):
    """Write a JSON object, indented."""
    path.write_bytes(orjson.dumps(tree, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
