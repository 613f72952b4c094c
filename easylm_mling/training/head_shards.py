"""How the output head lies over the devices while the loss is computed: one copy for each group of neighbours along fsdp.

Stored, a head is cut along D: every device would gather all of it, and sum all of its gradient with the others. Here the
devices of a group each hold a part of the vocabulary, and see the hidden states of the whole group instead. A larger group
moves more hidden states and less of the head. The gradient of a part is complete over its group without any reduction, and
so small that it is held, and reduced over the other groups, in float32.

Axis letters: B rows, T positions, D embed, V vocabulary of one tensor shard, F devices along fsdp, P devices of a group.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh


class HeadShards(NamedTuple):
    """The exchanges between devices that share a head; every method but `on` runs inside of a shard_map, or on ALONE."""

    fsdp: int
    group: int
    tensor: int

    @classmethod
    def on(cls, mesh: AbstractMesh, positions: int, vocabulary: int) -> "HeadShards":
        """The grouping that moves least on `mesh`, for `positions` (B * T) on each device and a head of `vocabulary` rows.

        Each device takes in P * B * T hidden states and V / P rows of the head, and their gradients go the same way back.
        """
        fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
        rows = vocabulary // tensor
        possible = [p for p in range(1, fsdp + 1) if math.gcd(fsdp, rows) % p == 0]
        return cls(fsdp, min(possible, key=lambda p: p * positions + rows // p), tensor)

    def gather_head(self, stored: jax.Array) -> jax.Array:
        """[D, V / P] of the stored [D / F, V]."""
        if self.group > 1:
            stored = jax.lax.all_to_all(stored, "fsdp", 1, 0, axis_index_groups=self._near, tiled=True)
        if self.group < self.fsdp:
            stored = jax.lax.all_gather(stored, "fsdp", axis=0, axis_index_groups=self._far, tiled=True)
        return stored

    def scatter_head_gradient(self, gradient: jax.Array) -> jax.Array:
        """[D / F, V], summed over the groups, of each device's [D, V / P]: `gather_head` transposed."""
        if self.group < self.fsdp:
            gradient = jax.lax.psum_scatter(gradient, "fsdp", axis_index_groups=self._far, tiled=True)
        if self.group > 1:
            gradient = jax.lax.all_to_all(gradient, "fsdp", 0, 1, axis_index_groups=self._near, tiled=True)
        return gradient

    def gather_rows(self, x: jax.Array) -> jax.Array:
        """[P * B, ...]: the rows of the whole group."""
        return jax.lax.all_gather(x, "fsdp", axis_index_groups=self._near, tiled=True) if self.group > 1 else x

    def own_rows(self, x: jax.Array) -> jax.Array:
        """[B, ...] of [P * B, ...]."""
        rows = x.shape[0] // self.group
        return jax.lax.dynamic_slice_in_dim(x, rows * self._place, rows) if self.group > 1 else x

    def sum_own_rows(self, x: jax.Array) -> jax.Array:
        """[B, ...] of each device's [P * B, ...], summed over all parts of the vocabulary."""
        if self.group > 1:
            x = jax.lax.psum_scatter(x, "fsdp", axis_index_groups=self._near, tiled=True)
        return jax.lax.psum(x, "tensor") if self.tensor > 1 else x

    def gather_parts(self, x: jax.Array) -> jax.Array:
        """[parts of the vocabulary, ...] of what each device has for its own."""
        x = x[None]
        if self.group > 1:
            x = jax.lax.all_gather(x, "fsdp", axis_index_groups=self._near, tiled=True)
        return jax.lax.all_gather(x, "tensor", tiled=True) if self.tensor > 1 else x

    def first_token(self, width: int) -> jax.Array | int:
        """The id of the first token of this device's part, which is `width` wide."""
        shard = jax.lax.axis_index("tensor") if self.tensor > 1 else 0
        return jnp.int32(width) * (shard * self.group + self._place)

    @property
    def _place(self) -> jax.Array | int:
        return jax.lax.axis_index("fsdp") % self.group if self.group > 1 else 0

    @property
    def _near(self) -> list[list[int]]:
        """The devices of each group: neighbours, so that their columns of a stored head follow one another."""
        return [list(range(first, first + self.group)) for first in range(0, self.fsdp, self.group)]

    @property
    def _far(self) -> list[list[int]]:
        """The devices of each part of the vocabulary."""
        return [list(range(place, self.fsdp, self.group)) for place in range(self.group)]


ALONE = HeadShards(1, 1, 1)
