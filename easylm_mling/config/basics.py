"""Lengths of training and the checks that every part of a config uses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Duration:
    """A length of training: written `2000 steps`, `1.5B tokens` or `500M tokens`."""

    amount: int
    unit: str

    def to_steps(self, tokens_per_step: int) -> int:
        """Whole steps that cover this duration (rounded up)."""
        return self.amount if self.unit == "steps" else -(-self.amount // tokens_per_step)

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}"
