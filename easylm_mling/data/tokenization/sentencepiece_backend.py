"""A tokenizer.model, read by SentencePiece."""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import sentencepiece

SPACE = "\u2581"  # how a piece writes a space
_PIECES = 1  # number of the field `pieces` in a SentencePiece model; in a piece 1 is its text, and 3 its type
# Behind a model, the field `normalizer_spec` once more: with neither add_dummy_prefix nor remove_extra_whitespaces.
_AS_IT_STANDS = bytes([3 << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])
_USER_DEFINED, _CONTROL = 4, 3  # types of a piece


class SentencePieceBackend:
    """A SentencePiece model. Threads may share one: SentencePiece only reads while it encodes and decodes."""

    kind = "SentencePiece"

    def __init__(self, model: bytes):
        """Parse a serialised model; raises RuntimeError if it is none."""
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(model)
        self._model = model
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = self._pieces.pad_id()

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that no text can write."""
        return frozenset(i for i in range(self.vocab_size) if self._pieces.is_control(i) or self._pieces.is_unused(i))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the int32 ids of each text."""
        # One text at a time: SentencePiece's own batches start threads at every call, and are no faster.
        return [self._pieces.encode_as_numpy(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control pieces have none."""
        return self._pieces.decode(list(ids))

    def piece(self, i: int) -> str:
        """Return the vocabulary's entry `i`, with spaces as the model writes them."""
        return self._pieces.id_to_piece(i)

    def text(self, i: int) -> str:
        """Return the text of piece `i`."""
        return self.piece(i).replace(SPACE, " ")

    def spell(self, text: str) -> list[int]:
        """Return the ids of `text` as it stands, without a space before it."""
        return self._speller.encode(text)

    @cached_property
    def _speller(self) -> sentencepiece.SentencePieceProcessor:
        speller = sentencepiece.SentencePieceProcessor()
        speller.LoadFromSerializedProto(self._model + _AS_IT_STANDS)
        return speller

    def text_bytes(self, i: int) -> float:
        """Bytes of text that id `i` stands for: 0 for a control piece, NaN for the unknown one."""
        pieces = self._pieces
        if pieces.is_control(i) or pieces.is_byte(i):
            return float(pieces.is_byte(i))
        return math.nan if pieces.is_unknown(i) else len(pieces.id_to_piece(i).replace(SPACE, " ").encode())


def with_controls(model: bytes, controls: frozenset[str]) -> bytes:
    """Return the model with the user-defined pieces among `controls` made control pieces, which no text can write.

    Gemma lists the marks of turns as text of a user's own.
    Only the one byte of each piece's type changes, so nothing is lost of what SentencePiece alone understands. Bytes that
    are no model are returned as they are.
    """
    out = bytearray(model)
    if not any(name.encode() in model for name in controls):
        return model
    try:
        for number, start, end in _fields(model, 0, len(model)):
            parts = {n: (first, last) for n, first, last in _fields(model, start, end)} if number == _PIECES else {}
            if 1 in parts and 3 in parts and model[slice(*parts[3])] == bytes([_USER_DEFINED]):
                if model[slice(*parts[1])].decode(errors="replace") in controls:
                    out[parts[3][0]] = _CONTROL
    except (LookupError, ValueError):
        return model
    return bytes(out)


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of each protobuf field's value in `data[start:end]`."""
    while start < end:
        key, start = _varint(data, start)
        if key & 7 == 2:
            size, start = _varint(data, start)
        elif key & 7 == 0:
            size = _varint(data, start)[1] - start
        else:
            size = {1: 8, 5: 4}[key & 7]
        if start + size > end:
            raise ValueError("a field is longer than what it lies in")
        yield key >> 3, start, start + size
        start += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the protobuf integer at `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
