"""The tokenizer files that travel with a model: which one counts, and how they are copied."""

import shutil
from pathlib import Path

from easylm_mling.errors import ConfigError

TOKENIZER_FOLDER = "tokenizer"
# In the order in which they count.
JSON, MODEL = "tokenizer.json", "tokenizer.model"
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


def tokenizer_file(path: Path, key: str = "") -> Path:
    """Return the file that `path` means: itself, or of a folder its tokenizer.json, else its tokenizer.model.

    transformers decides so, too. Raises ConfigError if there is none; the message begins with `key`.
    """
    if path.is_dir():
        for name in (JSON, MODEL):
            if (path / name).is_file():
                return path / name
        raise ConfigError(f"{key}{path}: holds no tokenizer.json and no tokenizer.model; copy the model's own into it")
    if not path.exists() and (path.parent / JSON).is_file():
        raise ConfigError(f"{key}{path}: does not exist; there is only a tokenizer.json in {path.parent}, so name that")
    return path


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a tokenizer's files into the folder `target`, byte for byte; returns their names.

    `source` is their folder, or the SentencePiece model or tokenizer.json itself, which becomes tokenizer.model or
    tokenizer.json; the Hugging Face files beside it are copied, too. None is parsed and saved again: that is how
    tokenizers come to add no BOS, or two.
    """
    folder = source.parent if source.is_file() else source
    files = {name: folder / name for name in TOKENIZER_FILES}
    if source.is_file():
        files[JSON if source.suffix == ".json" else MODEL] = source
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
