"""Text to token ids and back, by SentencePiece with the model's own tokenizer.model."""

import math
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import sentencepiece

from easylm_mling.config import ModelConfig
from easylm_mling.errors import ConfigError


class Tokenizer:
    """A SentencePiece model. Threads may share one: SentencePiece only reads while it encodes and decodes."""

    def __init__(self, path: str):
        """Read the file; raises ConfigError if it is missing or no SentencePiece model."""
        self.path = path
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            model = Path(path).read_bytes()
            self._pieces.LoadFromSerializedProto(model)
        except (OSError, RuntimeError) as error:
            detail = " ".join(str(error).split())
            raise ConfigError(
                f"data.tokenizer={path}: is not a readable SentencePiece model ({detail}); name a tokenizer.model (models that "
                "have none, such as Llama 3, cannot be trained here)"
            ) from error
        self.fingerprint = blake2b(model, digest_size=16).hexdigest()
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = self._pieces.pad_id()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the int32 ids of each text, without BOS or EOS. Control tokens written out in a text stay text."""
        # One text at a time: SentencePiece's own batches start threads at every call, and are no faster.
        return [self._pieces.encode_as_numpy(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; control tokens have none."""
        return self._pieces.decode([int(i) for i in ids])

    @cached_property
    def bytes_of_pieces(self) -> np.ndarray:
        """Bytes of text that each id stands for, float64 [vocabulary]: 0 for control pieces, NaN for the unknown one."""
        pieces = self._pieces

        def count(i: int) -> float:
            if pieces.is_control(i) or pieces.is_byte(i):
                return float(pieces.is_byte(i))
            return math.nan if pieces.is_unknown(i) else len(pieces.id_to_piece(i).replace("▁", " ").encode())

        return np.array([count(i) for i in range(self.vocab_size)])

    def check_model(self, model: ModelConfig):
        """Raise ConfigError unless the model has an embedding row for every id, and the same BOS, EOS and pad ids."""
        if self.vocab_size > model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={model.vocab_size} is less than the {self.vocab_size} pieces of "
                f"data.tokenizer={self.path}; set it to at least {self.vocab_size}, or use the tokenizer of the model"
            )
        for name in ("bos", "eos", "pad"):
            ours, theirs = getattr(self, f"{name}_id"), getattr(model, f"{name}_token_id")
            if ours != theirs:
                raise ConfigError(
                    f"model.{name}_token_id={theirs}, but {name} is {ours} in data.tokenizer={self.path}; "
                    "set the model's id to the tokenizer's, or use the tokenizer of the model"
                )


def join_documents(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return the documents' tokens end to end, int32 [n], each document with one BOS before and one EOS behind it."""
    parts, bos, eos = (
        [np.zeros(0, np.int32)],
        np.array([tokenizer.bos_id], np.int32),
        np.array([tokenizer.eos_id], np.int32),
    )
    for ids in tokenizer.encode(texts):
        parts += (bos, ids, eos)
    joined = np.concatenate(parts)
    # The cursor counts documents by these two ids: no text may hold them.
    assert np.count_nonzero(joined == tokenizer.bos_id) == len(texts) == np.count_nonzero(joined == tokenizer.eos_id)
    return joined
