"""Digests of arrays: they show that a restored checkpoint is what was saved, where storage does not notice a flipped bit."""

from functools import cache, partial
from hashlib import blake2b
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

# The hash of a place: odd numbers, so that nothing is lost.
_SPREAD, _MIX = 0x9E3779B1, 0x85EBCA6B


def digests(tree: Any) -> dict[str, str]:
    """A digest of each leaf, by its path: the same on any mesh and any number of processes. Collective.

    A jax.Array's is computed where it lies: two sums of its bits as wrapping uint32, plain and weighted by a hash of the
    place. A flipped bit, or two places exchanged, always changes one of them, because the weights are odd. A NumPy array's
    is a BLAKE2b.
    """
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    on_device = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    by_path = {p: blake2b(v.tobytes(), digest_size=8).hexdigest() for p, v in leaves.items() if p not in on_device}
    if on_device:
        sharding = next(iter(on_device.values())).sharding
        whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
        for path, (plain, placed) in zip(
            on_device, np.asarray(_on_device(whole)(list(on_device.values()))), strict=True
        ):
            by_path[path] = f"{plain:08x}{placed:08x}"
    return by_path


def differing(stored: dict[str, str], tree: Any) -> str | None:
    """The path of the first leaf whose digest is not the `stored` one; None if all agree. Collective."""
    now = digests(tree)
    return next((path for path in sorted(now.keys() | stored.keys()) if now.get(path) != stored.get(path)), None)


class Pieces:
    """The digest, as of `digests`, of a float32 array that the host reads piece by piece, in any order."""

    _AT_A_TIME = 1 << 15  # values whose temporary arrays stay in a core's cache

    def __init__(self):
        self.size, self._plain, self._placed = 0, 0, 0

    def add(self, values: np.ndarray, first: int, stride: int):
        """Add `values`, float32 [R, C]: row r lies in the flat array from place `first + r * stride` on."""
        bits = values.view(np.uint32)
        height, width = max(1, self._AT_A_TIME // max(1, bits.shape[1])), self._AT_A_TIME
        for r, c in product(range(0, bits.shape[0], height), range(0, bits.shape[1], width)):
            part = bits[r : r + height, c : c + width]
            row, column = (np.arange(n, dtype=np.uint32) for n in part.shape)
            place = row * np.uint32(stride % (1 << 32)) + np.uint32((first + r * stride + c) % (1 << 32))
            # As `_factor`, in place: the time goes into memory that the cache must bring.
            weights = place[:, None] * np.uint32(_SPREAD) + column * np.uint32(_SPREAD)
            weights ^= weights >> np.uint32(16)
            weights *= np.uint32(_MIX)
            weights |= np.uint32(1)
            weights *= part
            self._plain += int(part.sum(dtype=np.uint32))
            self._placed += int(weights.sum(dtype=np.uint32))
        self.size += bits.size

    def __str__(self) -> str:
        return f"{self._plain % (1 << 32):08x}{self._placed % (1 << 32):08x}"


def leaf_name(*names: str) -> str:
    """The name that `digests` gives the leaf at these keys."""
    return "".join(f"[{name!r}]" for name in names)


@cache
def _on_device(whole: NamedSharding | None):
    return jax.jit(lambda leaves: jnp.stack([_sums(leaf) for leaf in leaves]), out_shardings=whole)


def _sums(x: jax.Array) -> jax.Array:
    """The two sums of `x`, uint32 [2]."""
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % (1 << 32))
        stride *= x.shape[axis]
    total = partial(jnp.sum, dtype=jnp.uint32)
    return jnp.stack([total(bits), total(bits * _factor(place))])


def _factor(place):
    """The weight of each place in an array, an odd uint32."""
    place = place * np.uint32(_SPREAD)
    return (place ^ (place >> np.uint32(16))) * np.uint32(_MIX) | np.uint32(1)
