"""The tokenizer's files of an export: the checkpoint's own, complete for transformers, and what transformers makes of them."""

import importlib.util
from collections.abc import Set
from pathlib import Path

import sentencepiece

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.files import JSON, MODEL, TOKENIZER_FOLDER
from easylm_mling.data.tokenization.tokenizer import Tokenizer, fingerprints
from easylm_mling.errors import ConfigError, one_line
from easylm_mling.hf.json_files import write_json

_CONFIG = "tokenizer_config.json"


def own_tokenizer(files: Path, stored: Set[str]) -> Path:
    """Return the folder of the tokenizer that a checkpoint was trained with, by its `stored` fingerprints (none: not known).

    Raises ConfigError if there are only others: a damaged file is one, too.
    """
    folder = files / TOKENIZER_FOLDER
    own = fingerprints(folder)
    if not stored or not own:
        return folder
    # After --accept-data-change with another tokenizer, older ones lie beside it.
    for candidate in (folder, *sorted(files.glob(f"{TOKENIZER_FOLDER}-to-step-*"))):
        if stored <= {*fingerprints(candidate).values()}:
            return candidate
    wrong = " or ".join(str(folder / name) for name, value in own.items() if value not in stored) or folder
    raise ConfigError(
        f"{wrong}: damaged, or not the tokenizer that the checkpoint was trained with; copy that one here again"
    )


def complete_tokenizer(folder: Path):
    """Write tokenizer_config.json beside a lone tokenizer.model, from which transformers would add no BOS."""
    if not (folder / MODEL).is_file() or any((folder / name).is_file() for name in (JSON, _CONFIG)):
        return
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    # Llama's puts a space before a text, as add_dummy_prefix says, and Gemma's does not.
    spaced = pieces.encode("a", out_type=str)[0].startswith("\u2581")
    special = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id(), "unk": pieces.unk_id()}
    tree = {
        "tokenizer_class": "LlamaTokenizer" if spaced else "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    tree |= {f"{name}_token": pieces.id_to_piece(i) for name, i in special.items() if i >= 0}
    write_json(folder / _CONFIG, tree)


def separator_of(folder: Path) -> tuple[str, int] | None:
    """Return the token that stands before documents in training, where the tokenizer in `folder` has no BOS of its own.

    Its name and its id; None for a tokenizer that has a BOS, that cannot be read, or that is not there.
    """
    try:
        tokenizer = Tokenizer(str(folder), key="")
    except ConfigError:
        return None
    return None if tokenizer.has_bos else (tokenizer.piece(tokenizer.bos_id), tokenizer.bos_id)


def bos_seen(folder: Path, model: ModelConfig, shown: str | Path) -> tuple[int | None, list[str]]:
    """Return how many BOS transformers' tokenizer puts before a text, and warnings that call the folder `shown`.

    None: there is no tokenizer here, it cannot be loaded, transformers is not installed, or the model has no BOS.
    """
    if model.bos_token_id < 0 or not any((folder / name).is_file() for name in (MODEL, JSON)):
        return None, []
    if importlib.util.find_spec("transformers") is None:
        return None, []
    from transformers import AutoTokenizer

    try:
        ids = AutoTokenizer.from_pretrained(folder).encode("a")
    except Exception as error:  # transformers raises whatever its parsers do
        return None, [f"{shown}: transformers cannot load its tokenizer ({one_line(error)})"]
    count = next((n for n, i in enumerate(ids) if i != model.bos_token_id), len(ids))
    if count == 1 or (count == 0 and separator_of(folder)):
        return count, []
    return count, [
        f"{shown}: its tokenizer puts {count} BOS before a text, and the model needs one; mend tokenizer_config.json"
    ]
