"""Add pieces to a vocabulary: a tokenizer that extends the model's own, and embedding rows for the new pieces.

A new piece starts as the mean of the rows that its text had under the old tokenizer (Hewitt 2021, "Initializing new
word embeddings", averages over all rows; over the piece's own text, as here, it starts nearer to what it will mean).
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from easylm_mling.config import ModelConfig
from easylm_mling.errors import ConfigError

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
# Gemma's and Llama's names of the rows; an untied head grows as the embedding does.
_GROWN = ("model.embed_tokens.weight", "lm_head.weight")


def spelled(old_tokenizer: Path, new_tokenizer: Path) -> tuple[int, list[list[int]]]:
    """(pieces of the old tokenizer, the old ids of each new piece's text). Both are SentencePiece models.

    Raises ConfigError unless the new tokenizer has every old piece under its old id, and more of them.
    """
    old, new = _load(old_tokenizer), _load(new_tokenizer)
    count = old.vocab_size()
    if new.vocab_size() <= count:
        raise ConfigError(
            f"{new_tokenizer}: {new.vocab_size()} pieces are no more than the {count} of {old_tokenizer}; "
            "leave out --tokenizer, or name the one with the new pieces"
        )
    for i in range(count):
        if new.id_to_piece(i) != old.id_to_piece(i):
            raise ConfigError(
                f"{new_tokenizer}: piece {i} is {new.id_to_piece(i)!r}, but {old.id_to_piece(i)!r} in {old_tokenizer}; "
                "append new pieces behind the old ones"
            )
    if old.encode("a", out_type=str)[0].startswith(_SPACE):
        raise ConfigError(
            f"{old_tokenizer}: it puts a space before every text, so a piece's text cannot be told from the space; "
            "only tokenizers without a dummy prefix can be extended"
        )
    texts = [new.id_to_piece(i).replace(_SPACE, " ") for i in range(count, new.vocab_size())]
    return count, old.encode(texts)


def grow(
    weights: dict[str, Any], model: ModelConfig, pieces: int, spellings: list[list[int]]
) -> tuple[dict[str, Any], ModelConfig]:
    """The weights and config with a row for each new piece; rows `pieces` and on, where the model has them, were unused."""
    if pieces > model.vocab_size:
        raise ConfigError(
            f"the model has {model.vocab_size} rows, but its tokenizer.model {pieces} pieces; use the tokenizer that came "
            "with the weights"
        )
    size = max(model.vocab_size, pieces + len(spellings))
    grown = {n: _GrownRows(weights[n], pieces, spellings) for n in _GROWN if n in weights}
    return weights | grown, dataclasses.replace(model, vocab_size=size)


class _GrownRows:
    """A stored embedding [V, D] that can be sliced as if it had the new rows; each old row is read when it is asked for."""

    def __init__(self, stored: Any, pieces: int, spellings: list[list[int]]):
        self.stored, self.pieces, self.spellings = stored, pieces, spellings

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """float32 rows and columns of `index` (slices with both ends)."""
        rows, columns = index
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        new = range(max(rows.start, self.pieces), min(rows.stop, self.pieces + len(self.spellings)))
        for start, stop in ((rows.start, min(rows.stop, self.pieces)), (max(rows.start, new.stop), rows.stop)):
            if start < stop:
                out[start - rows.start : stop - rows.start] = self.stored[start:stop, columns]
        for row in new:
            old = [self.stored[i : i + 1, columns][0].astype(np.float64) for i in self.spellings[row - self.pieces]]
            out[row - rows.start] = np.mean(old, axis=0)
        return out


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    file = path / "tokenizer.model" if path.is_dir() else path
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(file.read_bytes())
    except (OSError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"{file}: is not a readable SentencePiece model ({detail}); name a tokenizer.model or the folder that has it"
        ) from None
    return processor
