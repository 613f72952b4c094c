"""Add pieces to a vocabulary: a tokenizer that extends the model's own, and embedding rows for the new pieces.

A new piece's row starts as the mean of the rows that spell its text in the old tokenizer. (Hewitt 2021, "Initializing new
word embeddings", takes the mean of all rows; a piece's own text is nearer to what the row will mean.)
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.files import tokenizer_file
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError

# The tensors with a row for each piece.
_WITH_ROWS = ("model.embed_tokens.weight", "model.embed_tokens_per_layer.weight", "lm_head.weight")


def extend_vocabulary(
    weights: dict[str, Any], model: ModelConfig, old_tokenizer: Path, new_tokenizer: Path
) -> tuple[dict[str, Any], ModelConfig]:
    """Return the weights and the config with a row for each new piece, behind those of the old pieces.

    The tokenizers are a tokenizer.json or a tokenizer.model, or a folder. Both are of one kind: of a folder with both files
    the one counts that `new_tokenizer` is. Raises ConfigError unless the new one has every old piece under its old id, and
    more pieces, and the model has a row for each old piece.
    """
    old, new = _open_both(old_tokenizer, new_tokenizer)
    count = old.vocab_size
    if new.vocab_size <= count:
        raise ConfigError(
            f"{new_tokenizer}: {new.vocab_size} pieces are no more than the {count} of {old_tokenizer}; "
            "leave out --tokenizer, or name the one with the new pieces"
        )
    for i in range(count):
        if new.piece(i) != old.piece(i):
            raise ConfigError(
                f"{new_tokenizer}: piece {i} is {new.piece(i)!r}, but {old.piece(i)!r} in {old_tokenizer}; "
                "append new pieces behind the old ones"
            )
    if count > model.vocab_size:
        raise ConfigError(
            f"the model has {model.vocab_size} rows, but its {Path(old.path).name} {count} pieces; use the tokenizer that "
            "came with the weights"
        )
    spellings = [old.spell(new.text_of_piece(i)) for i in range(count, new.vocab_size)]
    if [] in spellings:
        i = count + spellings.index([])
        raise ConfigError(
            f"{new_tokenizer}: {old_tokenizer} has no pieces for the text of piece {i}, {new.piece(i)!r}; leave it out"
        )
    extended = {name: _ExtendedRows(weights[name], count, spellings) for name in _WITH_ROWS if name in weights}
    # The model may have had unused rows behind those of the old pieces.
    size = max(model.vocab_size, new.vocab_size)
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


def _open_both(old: Path, new: Path) -> tuple[Tokenizer, Tokenizer]:
    file = tokenizer_file(new, "--tokenizer ")
    kind = "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"
    if old.is_dir():
        if not (old / kind).is_file():
            raise ConfigError(
                f"{old / kind}: does not exist, and {file} can continue no other kind; append the pieces to the model's "
                f"{tokenizer_file(old).name}"
            )
        old = old / kind
    return Tokenizer(str(old), key=""), Tokenizer(str(file), key="--tokenizer ")
