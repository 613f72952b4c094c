"""The kind of each layer, and the runs of layers that one scan covers: whole periods of the pattern of kinds.

Inside a period each layer's kind is known to the compiler, so a local layer has one attention kernel, and layers of two
shapes can alternate.
"""

from dataclasses import dataclass
from typing import NamedTuple

from easylm_mling.config import ModelConfig


@dataclass(frozen=True)
class LayerKind:
    """What differs from layer to layer: the attention's reach, and the shapes of parameters."""

    stack: str  # the stack of parameters that the layer is in
    local: bool  # which rotary frequencies it has
    window: int | None  # positions that it sees; None: all before it


class Run(NamedTuple):
    """Consecutive layers: `kinds`, those of one period, `count` times."""

    kinds: tuple[LayerKind, ...]
    count: int

    @property
    def per_period(self) -> dict[str, int]:
        """Layers of each stack in one period."""
        stacks = [kind.stack for kind in self.kinds]
        return {stack: stacks.count(stack) for stack in dict.fromkeys(stacks)}


def layer_kinds(m: ModelConfig) -> tuple[LayerKind, ...]:
    """Return the kind of each layer."""
    return tuple(LayerKind("layers", local, m.sliding_window if local else None) for local in m.local_layers)


def stacks(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return each stack's name and the numbers of its layers, in order."""
    kinds = layer_kinds(m)
    return {
        stack: tuple(i for i, kind in enumerate(kinds) if kind.stack == stack)
        for stack in dict.fromkeys(kind.stack for kind in kinds)
    }


def runs(kinds: tuple[LayerKind, ...]) -> list[Run]:
    """Cut consecutive layers into runs: the shortest period as often as it fits, and the same for what is left over.

    The 26 layers of Gemma 3 1B are 4 times (5 local, 1 global) and then 2 times (1 local).
    """
    if not kinds:
        return []
    period = next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[: len(kinds) - p])
    count = len(kinds) // period
    return [Run(kinds[:period], count), *runs(kinds[period * count :])]
