"""Add pieces to a vocabulary: a tokenizer that extends the model's own, and embedding rows for the new pieces.

A new piece's row starts as the mean of the rows that spell its text in the old tokenizer. (Hewitt 2021, "Initializing new
word embeddings", takes the mean of all rows; a piece's own text is nearer to what the row will mean.)
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from easylm_mling.config import ModelConfig
from easylm_mling.errors import ConfigError

_SPACE = "\u2581"  # SentencePiece's form of a space inside a piece
# The tensors with a row for each piece.
_WITH_ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def extend_vocabulary(
    weights: dict[str, Any], model: ModelConfig, old_tokenizer: Path, new_tokenizer: Path
) -> tuple[dict[str, Any], ModelConfig]:
    """Return the weights and the config with a row for each new piece, behind those of the old pieces.

    The tokenizers are SentencePiece models, files or their folders. Raises ConfigError unless the new one has every old piece
    under its old id, and more pieces, and the model has a row for each old piece.
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
            f"{old_tokenizer}: it puts a space before every text, so a piece cannot be spelled alone; only tokenizers "
            "without a dummy prefix can be extended"
        )
    if count > model.vocab_size:
        raise ConfigError(
            f"the model has {model.vocab_size} rows, but its tokenizer.model {count} pieces; use the tokenizer that came "
            "with the weights"
        )
    texts = [new.id_to_piece(i).replace(_SPACE, " ") for i in range(count, new.vocab_size())]
    extended = {name: _ExtendedRows(weights[name], count, old.encode(texts)) for name in _WITH_ROWS if name in weights}
    # The model may have had unused rows behind those of the old pieces.
    size = max(model.vocab_size, new.vocab_size())
    return weights | extended, dataclasses.replace(model, vocab_size=size)


class _ExtendedRows:
    """A stored embedding [V, D] that can be sliced as if it had the new rows. Reads only the rows of the slice."""

    def __init__(self, stored: Any, old_pieces: int, spellings: list[list[int]]):
        self.stored, self.old_pieces, self.spellings = stored, old_pieces, spellings

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """Read float32 rows and columns; `index` has slices with both ends."""
        rows, columns = index
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        new = range(max(rows.start, self.old_pieces), min(rows.stop, self.old_pieces + len(self.spellings)))
        for start, stop in ((rows.start, min(rows.stop, self.old_pieces)), (max(rows.start, new.stop), rows.stop)):
            if start < stop:
                out[start - rows.start : stop - rows.start] = self.stored[start:stop, columns]
        for row in new:
            spelling = self.spellings[row - self.old_pieces]
            old = [self.stored[i : i + 1, columns][0].astype(np.float64) for i in spelling]
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
