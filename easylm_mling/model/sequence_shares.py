"""Long texts: the positions of a row over a group of neighbours along fsdp, and attention between them.

A row of T positions is cut into 2N chunks, and device i of a group of N has its chunks i and 2N - 1 - i: the row's share i.
Under a causal mask every share then has the same number of pairs of a query and a key. Shares stand in a batch as rows of
T / N positions, so only attention, which is here, knows of them. A group holds R rows of the batch, and its devices the R
first shares of them, the R second ones, and so on.

Each device keeps its queries. It gathers all keys and values, or where a window ends within a chunk those of the chunk
before.

Axis letters: B rows here, N shares of a row, C positions of a chunk, T positions of a row, S keys; of heads as in model/attention.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from easylm_mling.model.attention import (
    Keys,
    Queries,
    Segments,
    WideKeys,
    WideSegments,
    Window,
    attend_from,
    on_each_device,
)
from easylm_mling.model.sharding import own_places

# (q, k, v, segments of the queries, those of the keys, number of the share, window, soft cap) -> context, on one device.
# The queries are those of the share, and the keys those of its whole row. Without a share the queries are at the last of
# the keys' positions.
ShareAttend = Callable[..., Queries]
NOWHERE = -1  # a segment id that no document has


def share_order(length: int, count: int) -> np.ndarray:
    """Return the positions of a row in the order of its shares, int64 [count, length / count]."""
    chunks = np.arange(length).reshape(2 * count, -1)
    return np.stack([chunks[:count], chunks[: count - 1 : -1]], axis=1).reshape(count, -1)


def divided(batch: dict[str, np.ndarray], mesh: Mesh, count: int) -> dict[str, np.ndarray]:
    """Return this process's shares of its rows, [shares, T / count], with each row's `source` beside all of its shares.

    The rows are those of `own_rows(mesh, rows of the batch, count)`.
    """
    if count == 1:
        return batch
    places = own_places(mesh)
    first = places.start // count
    groups = -(-places.stop // count) - first
    here = slice(places.start - first * count, places.stop - first * count)

    def of_shares(x: np.ndarray) -> np.ndarray:
        rows = x.reshape(groups, -1, *x.shape[1:])  # [groups, R, ...]
        if x.ndim == 1:
            shares = np.repeat(rows[:, None], count, axis=1)
        else:
            shares = np.moveaxis(rows[:, :, share_order(x.shape[1], count)], 2, 1)
        shares = shares.reshape(groups * count, *shares.shape[2:])[here]
        return np.ascontiguousarray(shares.reshape(-1, *shares.shape[2:]))

    return {name: of_shares(x) for name, x in batch.items()}


def attention_over_shares(
    q: Queries, k: Keys, v: Keys, segment_ids: Segments, window: Window, soft_cap: float | None,
    count: int, attend: ShareAttend, tile: int = 1,
) -> Queries:  # fmt: skip
    """Compute `attention.attention` of rows that lie in `count` shares, by `attend` on each device.

    The keys of a window begin at a multiple of `tile` before a chunk.
    """

    def run(q, k, v, segments):
        group, chunk = _Group(count), q.shape[1] // 2
        reach = 0 if window is None else -(-max(1, window - 1) // tile) * tile
        if window is None or reach > chunk:
            keys = group.gather((k, v, segments))
            return attend(q, *keys[:2], segments, keys[2], group.place, window, soft_cap)
        keys = group.with_reach((k, v, segments), reach)
        by_chunk = jax.tree.map(_chunks_as_rows, (q, segments))
        out = attend(by_chunk[0], *keys[:2], by_chunk[1], keys[2], None, window, soft_cap)
        return out.reshape(q.shape)

    return on_each_device(run, q, k, v, segment_ids)


def share_attention(
    q: Queries, k: WideKeys, v: WideKeys, query_segments: Segments, segment_ids: WideSegments,
    share: Int32[Array, ""] | None, window: Window, soft_cap: float | None, count: int,
) -> Queries:  # fmt: skip
    """Attend on one device, as `attention_over_shares` asks for it, by plain products."""
    T, S = q.shape[1], k.shape[1]
    index = S - T + jnp.arange(T) if share is None else jnp.asarray(share_order(S, count))[share]
    return attend_from(q, k, v, query_segments, segment_ids, index, window, soft_cap)


def _chunks_as_rows(x: jax.Array) -> jax.Array:
    """[2 B, C, ...] of [B, 2 C, ...]."""
    return x.reshape(2 * x.shape[0], x.shape[1] // 2, *x.shape[2:])


class _Group(NamedTuple):
    """The exchanges between the devices that hold the shares of the same rows, inside of a shard_map."""

    count: int

    @property
    def place(self) -> jax.Array:
        """The number of this device's share."""
        return jax.lax.axis_index("fsdp") % self.count

    @property
    def _groups(self) -> list[list[int]]:
        return [list(range(i, i + self.count)) for i in range(0, jax.lax.axis_size("fsdp"), self.count)]

    def gather(self, tree: Any) -> Any:
        """[B, T, ...], in the order of the positions, of each device's [B, T / N, ...]."""

        def whole(x: jax.Array) -> jax.Array:
            shares = jax.lax.all_gather(x, "fsdp", axis_index_groups=self._groups)
            early, late = jnp.split(shares, 2, axis=2)  # [N, B, C, ...]
            chunks = jnp.concatenate([early, late[::-1]])
            return jnp.moveaxis(chunks, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])

        return jax.tree.map(whole, tree)

    def with_reach(self, tree: tuple, reach: int) -> tuple:
        """[2 B, reach + C, ...] of (keys, values, segments): each chunk as a row, behind the end of the chunk before it.

        Before the first chunk of a row there is nothing, in the segment NOWHERE.
        """
        neighbours = [pair for group in self._groups for pair in zip(group[:-1], group[1:], strict=True)]
        back = [(b, a) for a, b in neighbours]

        def one(x: jax.Array, nothing: int) -> jax.Array:
            early, late = jnp.split(x, 2, axis=1)
            ends = early[:, -reach:], late[:, -reach:]
            before_early = jax.lax.ppermute(ends[0], "fsdp", neighbours)
            before_late = jax.lax.ppermute(ends[1], "fsdp", back)
            before_early = jnp.where(self.place == 0, jnp.asarray(nothing, x.dtype), before_early)
            # The middle two chunks of a row lie on one device.
            before_late = jnp.where(self.place == self.count - 1, ends[0], before_late)
            rows = [jnp.concatenate(pair, axis=1) for pair in ((before_early, early), (before_late, late))]
            return jnp.stack(rows, axis=1).reshape(2 * x.shape[0], -1, *x.shape[2:])

        keys, values, segments = tree
        return one(keys, 0), one(values, 0), one(segments, NOWHERE)
