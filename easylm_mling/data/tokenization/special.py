"""Special tokens of a model, from the Hugging Face files beside its tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from easylm_mling.errors import ConfigError

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# Files without others beside them do not say that these mark turns and images. No text means them.
_GEMMA = ("<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")


@dataclass(frozen=True)
class SpecialTokens:
    """The names of a tokenizer's special tokens; None for one that no file names."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    controls: frozenset[str] = frozenset(_GEMMA)  # written in a text, these are text
    added: dict[int, dict[str, Any]] = field(default_factory=dict)  # `added_tokens_decoder` of tokenizer_config.json

    def digestible(self) -> bytes:
        """Bytes that differ for other special tokens."""
        return orjson.dumps([self.bos, self.eos, self.pad, sorted(self.controls), sorted(self.added.items())])


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Read tokenizer_config.json and special_tokens_map.json of `folder`, either of which may be missing.

    As in transformers, the second counts only where the first has no `added_tokens_decoder`, and then it counts more. Raises
    ConfigError for a damaged file.
    """
    config = _read(folder / "tokenizer_config.json")
    tokens = {name: _content(config.get(name)) for name in _NAMES}
    extra = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    more = {} if "added_tokens_decoder" in config else _read(folder / "special_tokens_map.json")
    tokens = {name: _content(more.get(name)) or value for name, value in tokens.items()}
    extra += [more.get("additional_special_tokens"), more.get("extra_special_tokens")]
    decoder = config.get("added_tokens_decoder") or {}
    try:
        added = {int(i): dict(token, content=str(token["content"])) for i, token in decoder.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is damaged; copy it again"
        ) from None
    lists = [list(x.values()) if isinstance(x, dict) else x for x in extra if isinstance(x, list | dict)]
    names = {*tokens.values(), *(_content(x) for each in lists for x in each)}
    names |= {token["content"] for token in added.values() if token.get("special")}
    controls = frozenset(n for n in names if n) | frozenset(_GEMMA)
    return SpecialTokens(tokens["bos_token"], tokens["eos_token"], tokens["pad_token"], controls, added)


def _content(token: Any) -> str | None:
    """The text of a token, which may be written as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        tree = orjson.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); copy it again from the model") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: is no JSON object; copy it again from the model")
    return tree
