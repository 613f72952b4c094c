"""Text to token ids and back, with the model's own tokenizer: its tokenizer.json or its tokenizer.model."""

import re
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.files import JSON, MODEL, tokenizer_file
from easylm_mling.data.tokenization.huggingface_backend import HuggingFaceBackend
from easylm_mling.data.tokenization.sentencepiece_backend import SentencePieceBackend, with_controls
from easylm_mling.data.tokenization.special import SpecialTokens, read_special_tokens
from easylm_mling.errors import ConfigError

_MARK = re.compile(r"<.*>|\[.*\]")
_SEPARATOR = "<|endoftext|>"  # of documents, where a model was pretrained without BOS: GPT-2's, Qwen's


class Tokenizer:
    """A model's tokenizer. Threads may share one."""

    def __init__(self, path: str, key: str = "data.tokenizer="):
        """Read a tokenizer.json or a tokenizer.model, or the one that a folder means.

        Raises ConfigError if it is missing, unreadable, or has no EOS; the message begins with `key`.
        """
        self.path, self._shown = path, f"{key}{path}"
        self._file = file = tokenizer_file(Path(path), key)
        special = read_special_tokens(file.parent)
        try:
            content = file.read_bytes()
            if file.suffix == ".json":
                self._backend = HuggingFaceBackend(content, special)
            else:
                content = with_controls(content, special.controls)
                self._backend = SentencePieceBackend(content)
        except ConfigError as error:
            raise ConfigError(f"{self._shown}: {error}") from None
        except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
            detail = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{self._shown}: is not a readable SentencePiece model or tokenizer.json ({detail}); name a "
                "tokenizer.model, a tokenizer.json or the folder that holds one"
            ) from error
        self.kind = self._backend.kind
        self.fingerprint = _digest(file, content, special)
        self.vocab_size: int = self._backend.vocab_size
        self.eos_id: int = self._backend.eos_id
        self.pad_id: int = self._backend.pad_id
        if self.eos_id < 0:
            raise self._misses("eos")
        # Without a BOS of its own, documents follow the token that separated them in the model's pretraining.
        self.has_bos = self._backend.bos_id >= 0
        self.bos_id: int = self._backend.bos_id if self.has_bos else self._separator_id()

        self._control_names: re.Pattern | None = None
        self.texts_with_controls = 0  # texts that wrote the name of a control token, since count_controls was called

    def count_controls(self):
        """Count from now on in `texts_with_controls`. It takes time, so training does without; not for several threads."""
        names = sorted(filter(None, map(self.piece, self.control_ids)), key=len, reverse=True)
        self._control_names = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def _misses(self, name: str) -> ConfigError:
        return ConfigError(
            f"{self._shown}: names no {name} token, and every document needs one; put the model's "
            "tokenizer_config.json beside it, or use the tokenizer of the model"
        )

    def _separator_id(self) -> int:
        return next((i for i in sorted(self.control_ids) if self.piece(i) == _SEPARATOR), self.eos_id)

    @property
    def separates(self) -> bool:
        """True where one token begins a document and ends the one before it, as Qwen's <|endoftext|>."""
        return self.bos_id == self.eos_id

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that no text can write."""
        return self._backend.control_ids

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the int32 ids of each text, without BOS or EOS. Control tokens written out in a text stay text."""
        if self._control_names is not None:
            self.texts_with_controls += sum(self._control_names.search(text) is not None for text in texts)
        return self._backend.encode(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; control tokens have none."""
        return self._backend.decode([int(i) for i in ids])

    def piece(self, i: int) -> str:
        """Return the vocabulary's entry `i`, as its file writes it."""
        return self._backend.piece(i)

    def text_of_piece(self, i: int) -> str:
        """Return the text that id `i` stands for; of a piece of bytes that are no text alone, the piece."""
        return self._backend.text(i)

    def spell(self, text: str) -> list[int]:
        """Return the ids that spell `text` within a word: no space is put before it, as some tokenizers do with texts."""
        return self._backend.spell(text)

    @cached_property
    def bytes_of_pieces(self) -> np.ndarray:
        """Bytes of text that each id stands for, float64 [vocabulary]: 0 for control pieces, NaN for the unknown one."""
        return np.array([self._backend.text_bytes(i) for i in range(self.vocab_size)], np.float64)

    def check_model(self, model: ModelConfig):
        """Raise ConfigError unless the model has an embedding row for every id, and the same BOS, EOS and pad ids.

        A model may name no pad, and no BOS where the tokenizer has none. Also if it is a tokenizer.model beside another model's tokenizer.json, which transformers would read after an export.
        """
        if self.vocab_size > model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={model.vocab_size} is less than the {self.vocab_size} pieces of "
                f"{self._shown}; set it to at least {self.vocab_size}, or use the tokenizer of the model"
            )
        for name in ("bos", "eos", "pad"):
            ours, theirs = getattr(self, f"{name}_id"), getattr(model, f"{name}_token_id")
            if theirs < 0 and (name == "pad" or name == "bos" and not self.has_bos):
                continue
            if ours != theirs:
                if name == "bos" and not self.has_bos:
                    raise self._misses("bos")
                raise ConfigError(
                    f"model.{name}_token_id={theirs}, but {name} is {ours} in {self._shown}; "
                    "set the model's id to the tokenizer's, or use the tokenizer of the model"
                )
        self._check_neighbour()

    def _check_neighbour(self):
        other = self._file.with_name(JSON)
        if self._file.suffix == ".json" or not other.is_file():
            return
        theirs = Tokenizer(str(other), key="")
        for i in range(min(self.vocab_size, theirs.vocab_size)):
            ours, their = self.piece(i), theirs.piece(i)
            # Marks such as <unused7> may have been given names in one of the files.
            if ours != their and not (_MARK.fullmatch(ours) and _MARK.fullmatch(their)):
                raise ConfigError(
                    f"{self._shown}: piece {i} is {ours!r}, but {their!r} in the {JSON} beside it, which transformers reads; "
                    "put both files of the model there, or the tokenizer.model into a folder of its own"
                )


def join_documents(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return the documents' tokens end to end, int32 [n], each document with one BOS before and one EOS behind it.

    Where one token is both, it stands before each document only: the next document's ends this one.
    """
    parts, bos, eos = (
        [np.zeros(0, np.int32)],
        np.array([tokenizer.bos_id], np.int32),
        np.array([] if tokenizer.separates else [tokenizer.eos_id], np.int32),
    )
    for ids in tokenizer.encode(texts):
        parts += (bos, ids, eos)
    joined = np.concatenate(parts)
    # The cursor counts documents by these two ids: no text may hold them.
    assert np.count_nonzero(joined == tokenizer.bos_id) == len(texts) == np.count_nonzero(joined == tokenizer.eos_id)
    return joined


def document_ends(tokenizer: Tokenizer, joined: np.ndarray, following: int | None = None) -> np.ndarray:
    """Return the index behind the last token of each document that ends in `joined`, int64 [n].

    `following` is the token after `joined`; None: a document begins there.
    """
    after = np.append(joined, tokenizer.bos_id if following is None else following)[1:]
    return np.flatnonzero(after == tokenizer.bos_id) + 1


def fingerprint(file: Path) -> str:
    """Digest of all that decides a text's ids: the tokenizer's file, and what the files beside it add to it.

    The file is not parsed as a tokenizer, so it may be damaged. Raises OSError if it cannot be read, and ConfigError for
    damaged files beside it.
    """
    content, special = file.read_bytes(), read_special_tokens(file.parent)
    return _digest(file, content if file.suffix == ".json" else with_controls(content, special.controls), special)


def fingerprints(folder: Path) -> dict[str, str]:
    """Return name -> fingerprint for each tokenizer in `folder`: tokenizer.json, tokenizer.model, both or none."""
    return {name: fingerprint(folder / name) for name in (JSON, MODEL) if (folder / name).is_file()}


def stored_fingerprints(info: dict) -> frozenset[str]:
    """Return the fingerprints in a checkpoint's `info`: a run has one, an import one for each file; empty: not known."""
    value = info.get("tokenizer") or []
    return frozenset([value] if isinstance(value, str) else value)


def shipped_fingerprints(info: dict) -> frozenset[str]:
    """Return those of all tokenizer files that lay with a checkpoint, the unused one of a run, too."""
    return stored_fingerprints(info) | frozenset(info.get("tokenizer_beside", ()))


def _digest(file: Path, content: bytes, special: SpecialTokens) -> str:
    """`content` is the file's; of a tokenizer.model, with the controls of `special`."""
    return blake2b(content + (special.digestible() if file.suffix == ".json" else b""), digest_size=16).hexdigest()
