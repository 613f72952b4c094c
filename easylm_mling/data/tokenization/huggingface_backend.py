"""A tokenizer.json, read by Hugging Face tokenizers."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from easylm_mling.data.tokenization.special import SpecialTokens
from easylm_mling.errors import ConfigError

# The loader has threads of its own, and tokenizers would start one for each core of the host.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers  # noqa: E402
from tokenizers import pre_tokenizers  # noqa: E402

_SPACE = "\u2581"  # how a piece of SentencePiece's kind writes a space
_BATCH = 64  # texts in one call


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte, which byte-level pieces are written in: itself if it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


class HuggingFaceBackend:
    """A BPE or Unigram model of a tokenizer.json. Threads may share one."""

    kind = "Hugging Face tokenizers"

    def __init__(self, content: bytes, special: SpecialTokens):
        """Parse the file. Raises ValueError if it is no tokenizer.json, and ConfigError if it cannot be trained with."""
        tree = orjson.loads(content)
        _check_model(tree)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(_with_special(tree, special.controls, content).decode())
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(str(error)) from None
        # A file may say that texts are cut or filled up: documents are whole here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = {t["content"]: t for t in tree.get("added_tokens") or ()}
        self._add_missing(special, added)
        entries = self._tokenizer.get_vocab(with_added_tokens=True)
        self._pieces = {i: piece for piece, i in entries.items()}
        self.vocab_size: int = 1 + max(self._pieces)
        self.bos_id, self.eos_id, self.pad_id = (
            entries.get(name, -1) if name is not None else -1 for name in (special.bos, special.eos, special.pad)
        )
        self._added = {self._tokenizer.token_to_id(name): token for name, token in added.items()}
        names = {name for name, token in added.items() if token.get("special")} | special.controls
        self._unknown = _unknown_piece(tree["model"])
        self._controls = {entries[name]: name for name in names if name in entries and name != self._unknown}
        self.control_ids = frozenset(self._controls)
        self._forbid_controls(tree)
        kinds = re.findall(
            r'"type":\s*"(\w+)"', orjson.dumps([tree.get("pre_tokenizer"), tree.get("decoder")]).decode()
        )
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = bool(tree["model"].get("byte_fallback"))

    def _add_missing(self, special: SpecialTokens, added: dict[str, Any]):
        """Add the tokens that only the files beside it name, as transformers does."""
        for i, token in sorted(special.added.items()):
            name = token["content"]
            if name in added:
                continue
            flags = {k: bool(token.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            self._tokenizer.add_tokens([tokenizers.AddedToken(name, **flags)])
            added[name] = token
            if self._tokenizer.token_to_id(name) != i:
                raise ConfigError(
                    f"tokenizer_config.json gives {name!r} the id {i}, but tokenizer.json "
                    f"{self._tokenizer.token_to_id(name)}; use both files of one model"
                )

    def _forbid_controls(self, tree: dict[str, Any]):
        """See to it that a control token written in a text is text."""
        # Special tokens are not looked for in texts.
        self._tokenizer.encode_special_tokens = True
        # A model whose vocabulary has them as pieces could still put them together: their first character stands alone.
        model = tree["model"]
        names = [*self._controls.values(), *([self._unknown] if self._unknown else ())]
        cuts = [re.escape(n[0]) + f"(?={re.escape(n[1:])})" for n in sorted(_writable(model, names)) if len(n) > 1]
        if cuts:
            split = pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated")
            present = self._tokenizer.pre_tokenizer
            self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*([present] if present else []), split])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the int32 ids of each text. The file's post-processor, which may add BOS and EOS, is left out."""
        out = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            out += [np.array(e.ids, np.int32) for e in encodings]
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens have none."""
        return self._tokenizer.decode([i for i in ids if i not in self._controls], skip_special_tokens=False)

    def piece(self, i: int) -> str:
        """Return the vocabulary's entry `i`, as the file writes it; an id without an entry has none."""
        return self._pieces.get(i, "")

    def text(self, i: int) -> str:
        """Return the text of entry `i`; of bytes that are no text alone, the entry as the file writes it."""
        piece = self.piece(i)
        if i in self._added:
            return piece if self._byte_level else piece.replace(_SPACE, " ")
        if not self._byte_level:
            return piece.replace(_SPACE, " ")
        try:
            return bytes(_BYTES[c] for c in piece).decode()
        except (KeyError, UnicodeDecodeError):
            return piece

    def spell(self, text: str) -> list[int]:
        """Return the ids of `text` as the model alone spells it: nothing is put before it."""
        letters = {byte: letter for letter, byte in _BYTES.items()}
        piece = "".join(letters[b] for b in text.encode()) if self._byte_level else text.replace(" ", _SPACE)
        return [token.id for token in self._tokenizer.model.tokenize(piece)]

    def text_bytes(self, i: int) -> float:
        """Bytes of text that id `i` stands for: 0 for a control token, NaN where it is unknown."""
        piece = self._pieces.get(i)
        if piece is None or i in self._controls:
            return 0.0
        if piece == self._unknown:
            return math.nan
        if i in self._added:
            token = self._added[i]
            if token.get("lstrip") or token.get("rstrip"):  # it takes the spaces around it, too
                return math.nan
            return len((piece if self._byte_level else piece.replace(_SPACE, " ")).encode())
        if self._byte_level:
            return len(piece)
        if self._byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return 1.0
        return len(piece.replace(_SPACE, " ").encode())


def _check_model(tree: Any):
    """Raise ValueError if this is no tokenizer.json, and ConfigError for a model that training cannot use."""
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise ValueError("it has no model")
    model = tree["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "none named")
    if kind not in ("BPE", "Unigram"):
        raise ConfigError(f"its model is {kind}; only BPE and Unigram are supported")
    if model.get("dropout"):
        raise ConfigError("its BPE has dropout, so a text has other ids each time; set model.dropout to null in it")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ConfigError("its pieces have a prefix or a suffix that is no text; only BPE without them is supported")


def _with_special(tree: dict[str, Any], controls: frozenset[str], content: bytes) -> bytes:
    """Return the file with the tokens among `controls` marked as special: a text could write the others."""
    others = [t for t in tree.get("added_tokens") or () if t["content"] in controls and not t.get("special")]
    if not others:
        return content
    for token in others:
        token["special"] = True
    return orjson.dumps(tree)


def _unknown_piece(model: dict[str, Any]) -> str | None:
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _writable(model: dict[str, Any], names: list[str]) -> set[str]:
    """The pieces among `names` that the model could put together from a text."""
    vocabulary = {v if isinstance(v, str) else v[0] for v in model["vocab"]}
    if "merges" not in model or model.get("ignore_merges"):
        return vocabulary.intersection(names)
    merges = {"".join(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]}
    return (vocabulary & merges).intersection(names)
