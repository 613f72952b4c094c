"""How many tokens a run has trained on after so many steps, also where its batch size has changed."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class StepTokens:
    """The one place that turns steps into tokens and back.

    `per_step`: tokens of a step now. `earlier`: (last step, tokens a step) of each batch size before, in order.
    """

    per_step: int
    earlier: tuple[tuple[int, int], ...] = ()

    def pieces(self) -> list[tuple[int, int, int]]:
        """Return (steps before, tokens before, tokens a step) of each batch size, in order."""
        pieces, tokens, ends = [], 0, [0, *(step for step, _ in self.earlier)]
        for (start, end), (_, size) in zip(pairwise(ends), self.earlier, strict=True):
            pieces.append((start, tokens, size))
            tokens += (end - start) * size
        return [*pieces, (ends[-1], tokens, self.per_step)]

    def at(self, step: int) -> int:
        """Return the tokens of the first `step` steps."""
        start, tokens, size = next(piece for piece in reversed(self.pieces()) if piece[0] <= step)
        return tokens + (step - start) * size

    def step_of(self, tokens: int) -> int:
        """Return the least number of steps that have `tokens` tokens."""
        start, before, size = next(piece for piece in reversed(self.pieces()) if piece[1] < max(1, tokens))
        return start + max(0, -(-(tokens - before) // size))
