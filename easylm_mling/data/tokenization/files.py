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
    # How texts of the model end and are drawn; the ids of the tokenizer stand in it.
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a tokenizer's files into the folder `target`, byte for byte; returns their names.

    `source` is their folder, or the SentencePiece model itself, which becomes tokenizer.model; the Hugging Face files
    beside it are copied, too. None is parsed and saved again: that is how tokenizers come to add no BOS, or two.
    """
    model_file = source if source.is_file() else source / "tokenizer.model"
    files = {name: model_file.parent / name for name in TOKENIZER_FILES} | {"tokenizer.model": model_file}
    present = {name: file for name, file in files.items() if file.is_file()}
    if present:
        target.mkdir(parents=True, exist_ok=True)
    for name, file in present.items():
        shutil.copyfile(file, target / name)
    return list(present)


def check_inside(folder: Path):
    """Raise ConfigError if a tokenizer's file in `folder` links to a file elsewhere: what is copied may be published."""
    for name in TOKENIZER_FILES:
        if not (folder / name).resolve().is_relative_to(folder.parent.resolve()):
            raise ConfigError(f"{folder / name} is a link to a file elsewhere; put the file itself in its place")
