"""The text of tokens as they come: whole letters only, and nothing of a stop string or behind it."""

import re
from collections.abc import Sequence

from easylm_mling.data.tokenization.tokenizer import Tokenizer

_HALF = "\ufffd"  # how a letter whose bytes have not all come is decoded
# A piece of one byte. tokenizers decodes all such in a row together: the next one may undo letters before it.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """Turns token ids into text piece by piece. `ended` says why it is complete: stop, or empty if it is not."""

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], stops: Sequence[str] = ()):
        """`ends`: ids that end a text, which have none. `stops`: strings before which it ends."""
        self.ids: list[int] = []  # those of the text, without the end
        self.offsets: list[int] = []  # where the text of each begins
        self.text = ""  # what is sure
        self.ended = ""
        self._tokenizer, self._ends, self._stops = tokenizer, ends, tuple(filter(None, stops))
        self._silent = tokenizer.control_ids
        self._whole = self._sure = ""

    def add(self, token: int) -> bool:
        """Take one more token; returns whether it belongs to the text."""
        assert not self.ended
        if token in self._ends:
            self._finish(self._whole)
            return False
        self.offsets.append(len(self._sure))
        self.ids.append(token)
        # A model may have more rows than the tokenizer has pieces; those stand for no text.
        self._whole = self._tokenizer.decode([i for i in self.ids if i < self._tokenizer.vocab_size])
        cuts = [at for stop in self._stops if (at := self._whole.find(stop)) >= 0]
        if cuts:
            self._finish(self._whole[: min(cuts)])
            return True
        if self._ends_letters(token):
            self._sure = self._whole.rstrip(_HALF)
        longest = max((_overlap(self._sure, stop) for stop in self._stops), default=0)
        self.text = self._sure[: len(self._sure) - longest]
        return True

    def close(self) -> str:
        """Return the text of a stream that gets no more tokens."""
        if not self.ended:
            self.text = self._whole
        return self.text

    def _ends_letters(self, token: int) -> bool:
        """Return whether no later token can undo letters: a byte can, also behind tokens that have no text."""
        if token >= self._tokenizer.vocab_size or token in self._silent:
            return False
        return not _BYTE.fullmatch(self._tokenizer.piece(token))

    def _finish(self, text: str):
        self.text, self.ended = text, "stop"


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
