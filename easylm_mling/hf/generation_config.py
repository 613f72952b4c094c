"""What ends a text: `generation_config.json`, beside what config.json and the tokenizer say of it."""

from pathlib import Path

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.files import JSON, MODEL
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError
from easylm_mling.hf.json_files import read_json

GENERATION = "generation_config.json"


def text_ends(file: dict, directory: Path, default: int) -> list[int]:
    """Return the tokens that end a text, first the one that ends a document; [] if the files name none.

    `file`: config.json's content. `default`: the eos that transformers assumes where it names none, or -1.
    Of several, the tokenizer's eos ends a document, or the first where there is no tokenizer.
    """
    path = directory / GENERATION
    ends: list[int] = []
    for where, tree in ((directory / "config.json", file), (path, read_json(path) if path.is_file() else {})):
        value = tree.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            if where == path or isinstance(value, list):
                raise ConfigError(f"{where}: eos_token_id={value!r} must be token ids; correct it")
            return []  # ModelConfig says so
        if not ends and len(ids) > 1 and any((directory / name).is_file() for name in (JSON, MODEL)):
            own = Tokenizer(str(directory), key="").eos_id
            ids = sorted(ids, key=lambda i: i != own)
        ends += [i for i in ids if i not in ends]
    # generation_config.json alone does not say what ends a document.
    if file.get("eos_token_id") is not None or not ends or default < 0:
        return ends
    return [default, *(i for i in ends if i != default)]


def hf_generation_config(model: ModelConfig, kept: dict) -> dict:
    """Make the generation_config.json, without which a loader has to guess where a text ends.

    `kept` is the one that came with the model: its settings of sampling and the like stay, and the ids are the model's.
    """
    ids: dict = {name: getattr(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = [model.eos_token_id, *model.stop_token_ids]
    if len(ends) > 1:
        before = kept.get("eos_token_id")
        ids["eos_token_id"] = before if isinstance(before, list) and set(before) == set(ends) else ends
    return kept | {name: value for name, value in ids.items() if isinstance(value, list) or value >= 0}
