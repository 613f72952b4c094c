"""Copy the tokenizer files that travel with a model."""

import shutil
from pathlib import Path

from easylm_mling.errors import ConfigError

TOKENIZER_FOLDER = "tokenizer"


TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a tokenizer's files into the directory `target`, byte for byte; returns their names.

    `source` is their folder, or the SentencePiece model itself: whatever its name, it becomes tokenizer.model, and the
    Hugging Face files beside it come along. They are never parsed and saved again: that is how a tokenizer comes to
    add no BOS, or two.
    """
    model_file = source if source.is_file() else source / "tokenizer.model"
    files = {name: model_file.parent / name for name in TOKENIZER_FILES} | {"tokenizer.model": model_file}
    found = {name: file for name, file in files.items() if file.is_file()}
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name, file in found.items():
        shutil.copyfile(file, target / name)
    return list(found)


def check_inside(folder: Path):
    """Raise ConfigError if a tokenizer's file in `folder` is a link to somewhere else: what is copied may be published."""
    for name in TOKENIZER_FILES:
        if not (folder / name).resolve().is_relative_to(folder.parent.resolve()):
            raise ConfigError(f"{folder / name} is a link to a file elsewhere; put the file itself in its place")
