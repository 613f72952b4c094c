"""The text of tokens as they come: whole letters only, and nothing of a stop string or behind it."""

from collections.abc import Sequence

from easylm_mling.data.tokenization.tokenizer import Tokenizer

_HALF = "\ufffd"  # how a letter whose bytes have not all come is decoded


class TextStream:
    """Turns token ids into text piece by piece. `ended` says why it is complete: stop, or empty if it is not."""

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], stops: Sequence[str] = ()):
        """`ends`: ids that end a text, which have none. `stops`: strings before which it ends."""
        self.ids: list[int] = []  # those of the text, without the end
        self.offsets: list[int] = []  # where the text of each begins
        self.text = ""  # what is sure
        self.ended = ""
        self._tokenizer, self._ends, self._stops = tokenizer, ends, tuple(filter(None, stops))
        self._whole = self._sure = ""

    def add(self, token: int) -> bool:
        """Take one more token; returns whether it belongs to the text."""
        assert not self.ended
        if token in self._ends:
            self._finish(self._end())
            return False
        self.offsets.append(len(self._sure))
        self.ids.append(token)
        # A model may have more rows than the tokenizer has pieces; those stand for no text.
        self._whole = self._tokenizer.decode([i for i in self.ids if i < self._tokenizer.vocab_size])
        cuts = [at for stop in self._stops if (at := self._whole.find(stop)) >= 0]
        if cuts:
            self._finish(self._whole[: min(cuts)])
            return True
        # While a letter of several byte pieces comes, those before it may be undone for a while, too.
        whole_letters = self._whole.rstrip(_HALF)
        self._sure = whole_letters if whole_letters.startswith(self._sure) else self._sure
        longest = max((_overlap(self._sure, stop) for stop in self._stops), default=0)
        self.text = self._sure[: len(self._sure) - longest]
        return True

    def close(self) -> str:
        """Return the text of a stream that gets no more tokens."""
        if not self.ended:
            self.text = self._end()
        return self.text

    def _end(self) -> str:
        """Return all of the text; of a letter that never came whole, a mark."""
        return self._whole if self._whole.startswith(self._sure) else self._sure + _HALF

    def _finish(self, text: str):
        self.text, self.ended = text, "stop"


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
