"""Text to token ids and back, by SentencePiece with the model's own tokenizer.model."""

import math
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import sentencepiece

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.encoder import Encoder
from easylm_mling.errors import ConfigError

# Where fast encoders and SentencePiece part ways: white space, digits, unseen characters, control tokens as text.
_PROBES = (
    "", " a  b   c", "\t\n\n x\r\n", "1234567 ０１２", "e\u0301 x\u0308\u0323", "日本語\u3000한국어 ไทย",
    "😀👩\u200d👧 \U0001d4b3", "\ufffd\u200b\ufeff", "▁ ▁▁a▁", "<bos> <eos> <pad> <unk> <0x41>", "½ ﬁ ㌔ ﷺ",
    "\x01\x7f\u2028",
)  # fmt: skip


class Tokenizer:
    """A SentencePiece model that kitoken encodes with (see data/tokenization/encoder.py) and sentencepiece decodes with."""

    def __init__(self, path: str):
        """Raises ConfigError if the file is missing, no SentencePiece model, or one kitoken encodes differently."""
        self.path = path
        try:
            blob = Path(path).read_bytes()
            # Before kitoken, which ends the process over a file that only looks like a model.
            self._reference = sentencepiece.SentencePieceProcessor()
            self._reference.LoadFromSerializedProto(blob)
            self._fast = Encoder(blob)
        except (OSError, RuntimeError, ValueError) as error:
            detail = " ".join(str(error).split())
            raise ConfigError(
                f"data.tokenizer={path}: is not a readable SentencePiece model ({detail}); name a tokenizer.model"
            ) from error
        self.fingerprint = blake2b(blob, digest_size=16).hexdigest()
        self.vocab_size: int = self._reference.vocab_size()
        self.bos_id: int = self._reference.bos_id()
        self.eos_id: int = self._reference.eos_id()
        self.pad_id: int = self._reference.pad_id()
        for text, ids in zip(_PROBES, self._fast.encode(_PROBES), strict=True):
            if ids.tolist() != self._reference.encode(text):
                raise ConfigError(
                    f"data.tokenizer={path}: kitoken and sentencepiece disagree on {text!r}; train the tokenizer "
                    "as Gemma's is (normalization identity, no dummy prefix, white space kept)"
                )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without BOS or EOS. Control tokens written out in a text stay text."""
        return self._fast.encode(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._reference.decode([int(i) for i in ids])

    @cached_property
    def bytes_of_pieces(self) -> np.ndarray:
        """float64 [vocabulary]: how many bytes of text each id stands for; control pieces none, unknown ones NaN."""
        pieces = self._reference

        def count(i: int) -> float:
            if pieces.is_control(i) or pieces.is_byte(i):
                return float(pieces.is_byte(i))
            return math.nan if pieces.is_unknown(i) else len(pieces.id_to_piece(i).replace("▁", " ").encode())

        return np.array([count(i) for i in range(self.vocab_size)])

    def check_model(self, model: ModelConfig):
        """Raise ConfigError unless the model has a row for every id, and the same special ids."""
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
    """int32 [n]: the documents' tokens end to end, each with one BOS and one EOS."""
    parts, bos, eos = [], np.array([tokenizer.bos_id], np.int32), np.array([tokenizer.eos_id], np.int32)
    for ids in tokenizer.encode(texts):
        parts += (bos, ids, eos)
    joined = np.concatenate(parts)
    # The cursor counts documents by these two ids: no text may hold them.
    assert np.count_nonzero(joined == tokenizer.bos_id) == len(texts) == np.count_nonzero(joined == tokenizer.eos_id)
    return joined
