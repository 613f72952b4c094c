"""The kind of each layer, and the runs of layers that one scan covers: whole periods of the pattern of kinds.

Inside a period each layer's kind is known to the compiler, so a local layer has one attention kernel, and layers of two
shapes can alternate.
"""

from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from easylm_mling.config import ModelConfig


@dataclass(frozen=True)
class LayerKind:
    """What differs from layer to layer: the attention's reach, and the shapes of parameters."""

    stack: str  # the stack of parameters that the layer is in
    local: bool  # which rotary frequencies it has
    window: int | None  # positions that it sees; None: all before it
    head_dim: int
    kv_heads: int
    k_eq_v: bool  # it has no projection of values
    mlp_width: int
    shares: bool = False  # it attends to the keys and values of the last layer of its reach that has its own


class Run(NamedTuple):
    """Consecutive layers: `kinds`, those of one period, `count` times."""

    kinds: tuple[LayerKind, ...]
    count: int

    @property
    def shares(self) -> bool:
        """True where its layers have no keys and values of their own."""
        return self.kinds[0].shares

    @property
    def per_period(self) -> dict[str, int]:
        """Layers of each stack in one period."""
        stacks = [kind.stack for kind in self.kinds]
        return {stack: stacks.count(stack) for stack in dict.fromkeys(stacks)}

    @property
    def groups(self) -> list[tuple[LayerKind, int]]:
        """The kinds of one period in order, and how many layers of each follow one another."""
        return [(kind, len([*same])) for kind, same in groupby(self.kinds)]


def layer_kinds(m: ModelConfig) -> tuple[LayerKind, ...]:
    """Return the kind of each layer.

    The name of a stack is `layers`; where local and global layers differ in shape, each kind has a stack of its own, and so
    have layers that share keys and values.
    """
    width, K = m.intermediate_size, m.num_key_value_heads
    near = LayerKind("layers", True, m.sliding_window, m.head_dim, K, False, width)
    far = replace(near, local=False, window=None, head_dim=m.global_head_dim or m.head_dim, k_eq_v=m.attention_k_eq_v)
    far = replace(far, kv_heads=m.num_global_key_value_heads or K)
    if (near.head_dim, near.kv_heads, near.k_eq_v) != (far.head_dim, far.kv_heads, far.k_eq_v):
        near, far = replace(near, stack="local_layers"), replace(far, stack="global_layers")
    own = m.num_hidden_layers - m.num_kv_shared_layers
    return tuple(
        (near if local else far) if i < own else _sharing(m, near if local else far)
        for i, local in enumerate(m.local_layers)
    )


def _sharing(m: ModelConfig, kind: LayerKind) -> LayerKind:
    width = kind.mlp_width * (2 if m.use_double_wide_mlp else 1)
    return replace(kind, stack=f"shared_{kind.stack}", shares=True, k_eq_v=False, mlp_width=width)


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
    own = tuple(kind for kind in kinds if not kind.shares)
    if own and own != kinds:
        return [*runs(own), *runs(kinds[len(own) :])]  # layers that share come last
    if not kinds:
        return []
    period = next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[: len(kinds) - p])
    count = len(kinds) // period
    return [Run(kinds[:period], count), *runs(kinds[period * count :])]
