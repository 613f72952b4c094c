"""Pack many short sequences into few rows, as trees: what several begin with is computed once, and none sees another.

A query asks for the log-probability of one token after one position. The choices of a question are branches behind its
context, and questions with the same shots are branches behind those.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from easylm_mling.evaluation.scoring.windows import Window

_NARROWEST, _UNIT = 128, 512  # of rows, in tokens: a long text has a power of two, or whole units where the window ends
_STEPS = 8  # widths that are tried between one power of two and the next
_SHAPES = 4  # to which rows of one width are cut
_TRIM = 16  # tokens, to which a shape is rounded up; eight times as many where rows are wide
_WORTH = 4  # a sequence joins a tree that has at least one in so many of its tokens


@dataclass(frozen=True)
class Limits:
    """How much is computed at once, and how long a text may be, all in tokens but for `rows`."""

    length: int  # of a window: no more is read at once
    batch_tokens: int = 8192  # of a scored batch, on each shard of its rows
    row: int = 2048  # widest row into which short requests are packed; 0: one request a row
    rows: int = 16  # texts written at once


class Branch(NamedTuple):
    """A sequence to read, and for each of `windows` (numbers into a list of windows) what to predict at its end.

    Its first `shared` tokens are those of the branch before it.
    """

    inputs: bytes  # of int32, as a window's
    shared: int
    windows: list[int]
    targets: list[tuple[int, ...]]

    @property
    def size(self) -> int:
        """How many tokens it has, the shared ones among them."""
        return len(self.inputs) // 4

    @property
    def queries(self) -> int:
        """How many tokens are asked for."""
        return sum(map(len, self.targets))


@dataclass(frozen=True)
class Tree:
    """Branches in the order of their tokens, so that each begins as the one before it does."""

    branches: tuple[Branch, ...]

    @cached_property
    def size(self) -> int:
        """How many tokens are computed."""
        return sum(b.size - b.shared for b in self.branches)

    @cached_property
    def queries(self) -> int:
        """How many tokens are asked for."""
        return sum(b.queries for b in self.branches)

    def only(self, windows: set[int]) -> "Tree":
        """Return the tree of those of its windows that are among `windows`; it may have no branches."""
        kept, shared = [], 0
        for branch in self.branches:
            shared = min(shared, branch.shared) if kept else 0
            mine = [(n, t) for n, t in zip(branch.windows, branch.targets, strict=True) if n in windows]
            if mine:
                kept.append(Branch(branch.inputs, shared, [n for n, _ in mine], [t for _, t in mine]))
                shared = branch.size
        return Tree(tuple(kept))


@dataclass
class Row:
    """Trees side by side in `width` tokens."""

    width: int
    trees: list[Tree] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many of its tokens are real."""
        return sum(tree.size for tree in self.trees)


class Batch(NamedTuple):
    """Arrays of one forward pass, int32: tokens, positions and ends [B, T]; places and targets of queries [B, Q].

    The token at j is seen from j to ends[j] - 1. `owners` has for each query, row by row, the number of its window.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    owners: list[list[int]]


def branches_of(windows: Sequence[Window]) -> list[Branch]:
    """Return one branch for all windows that read the same tokens, in an order that puts together what begins alike."""
    by_inputs: dict[bytes, Branch] = {}
    for number, window in enumerate(windows):
        branch = by_inputs.setdefault(window.inputs, Branch(window.inputs, 0, [], []))
        branch.windows.append(number)
        branch.targets.append(window.targets)
    # Bytes are in the order of whole tokens, whatever that order is.
    branches = [by_inputs[inputs] for inputs in sorted(by_inputs)]
    return [b._replace(shared=_common(a.inputs, b.inputs)) for a, b in pairwise([Branch(b"", 0, [], []), *branches])]


def trees_of(branches: Sequence[Branch], narrowest: int, length: int) -> list[Tree]:
    """Join neighbouring branches into trees that fit into a row; with `narrowest` 0 each is a tree of its own."""
    trees: list[list[Branch]] = []
    room, queries = 0, 0
    for branch in branches:
        new, asked = branch.size - branch.shared, branch.queries
        if trees and narrowest and new <= room and asked <= queries and branch.shared * _WORTH >= branch.size:
            trees[-1].append(branch)
        else:
            trees.append([branch._replace(shared=0)])
            room = queries = row_width(branch.size, narrowest, length)
            new = branch.size
        room, queries = room - new, queries - asked
    return sorted((Tree(tuple(t)) for t in trees), key=lambda t: (-t.size, t.branches[0].inputs))


def row_width(tokens: int, narrowest: int, length: int) -> int:
    """Return the width of a row for `tokens`: `narrowest` or a power of two, at most about `length`."""
    widest = -(-length // _UNIT) * _UNIT if length > _UNIT else max(_NARROWEST, 1 << (length - 1).bit_length())
    return min(widest, narrowest if tokens <= narrowest else max(_NARROWEST, 1 << (tokens - 1).bit_length()))


def pack(trees: Sequence[Tree], narrowest: int, length: int) -> list[Row]:
    """Put each tree, longest first, into the fullest row that has room for it, or into a new row; with `narrowest` 0 always so."""
    rows: list[Row] = []
    rooms: list[tuple[int, int, int]] = []  # (tokens left, how many queries it has, row), sorted
    for tree in trees:
        size = tree.size
        place = bisect_left(rooms, (size, 0, 0))
        # Queries take memory as tokens do: a row has at most as many as tokens, unless one tree alone has more.
        while place < len(rooms) and rooms[place][1] + tree.queries > rows[rooms[place][2]].width:
            place += 1
        if place == len(rooms):
            rows.append(Row(row_width(size, narrowest, length)))
            left, queries, row = rows[-1].width, 0, len(rows) - 1
        else:
            left, queries, row = rooms.pop(place)
        rows[row].trees.append(tree)
        if left > size and narrowest:
            insort(rooms, (left - size, queries + tree.queries, row))
    return rows


def batches_of(windows: Sequence[Window], limits: Limits, shards: int, knee: float) -> list[list[Row]]:
    """Pack windows into rows of the width that costs least, and group rows of one width, widest first.

    A token costs 1 + width / knee: its attention costs what its row is wide. A wide row has less padding, and more questions
    behind the same shots. A batch has a multiple of `shards` rows; what is missing in a last one is filled up with empty rows.
    """
    if not windows:
        return []
    branches, tried = branches_of(windows), []
    for width in _widths(limits) if limits.row else [0]:
        rows = pack(trees_of(branches, width, limits.length), width, limits.length)
        batches = _batched(rows, limits.batch_tokens * shards, shards)
        tried.append((sum(r.width * (1 + r.width / knee) for rows in batches for r in rows), batches))
    return min(tried, key=lambda t: t[0])[1]


def _common(a: bytes, b: bytes) -> int:
    """Return how many tokens two sequences begin with alike."""
    x, y = np.frombuffer(a, np.int32), np.frombuffer(b, np.int32)
    n = min(len(x), len(y))
    other = np.flatnonzero(x[:n] != y[:n])
    return int(other[0]) if len(other) else n


def _widths(limits: Limits) -> list[int]:
    """Return the widths that are tried, narrowest first."""
    powers = [2 * _NARROWEST << n for n in range(limits.row.bit_length())]
    steps = {power * (_STEPS + n) // _STEPS for power in powers for n in range(_STEPS)}
    return sorted({row_width(1, min(width, limits.row), limits.length) for width in steps})


def _batched(rows: Sequence[Row], tokens: int, shards: int) -> list[list[Row]]:
    """Group rows into batches of about `tokens`, each cut to what the fullest of its shape holds."""
    batches = []
    for width in sorted({r.width for r in rows}, reverse=True):
        same = sorted((r for r in rows if r.width == width), key=lambda r: -r.size)
        # A shape is compiled, so there are few of them, and each has batches enough.
        shapes = min(_SHAPES, len(same), max(1, len(same) * width // tokens))
        for start, end in pairwise([len(same) * n // shapes for n in range(shapes + 1)]):
            batches += _of_one_shape(same[start:end], width, tokens, shards)
    return batches


def _of_one_shape(rows: list[Row], width: int, tokens: int, shards: int) -> list[list[Row]]:
    unit = _TRIM if width <= _UNIT else 8 * _TRIM
    width = min(width, -(-rows[0].size // unit) * unit)
    most = max(1, tokens // width // shards) * shards
    # Even batches, so that little is empty.
    count = -(-len(rows) // (-(-len(rows) // most) * shards)) * shards
    full = [Row(width, row.trees) for row in rows]
    parts = (full[start : start + count] for start in range(0, len(full), count))
    return [part + [Row(width) for _ in range(count - len(part))] for part in parts]


def arrays(rows: Sequence[Row]) -> Batch:
    """Lay rows out as arrays. Padding is token 0 and sees nothing; a padded query asks for token 0 after position 0."""
    B, T = len(rows), rows[0].width
    most = max(1, *(sum(t.queries for t in r.trees) for r in rows))
    Q = max(16, 1 << (most - 1).bit_length())
    tokens, positions, ends = (np.zeros((B, T), np.int32) for _ in range(3))
    places, targets = (np.zeros((B, Q), np.int32) for _ in range(2))
    owners: list[list[int]] = []
    for b, row in enumerate(rows):
        asked = 0
        owners.append([])
        for branch, path in _laid_out(row, ends[b]):
            tokens[b, path] = np.frombuffer(branch.inputs, np.int32)
            positions[b, path] = np.arange(len(path))
            for window, wanted in zip(branch.windows, branch.targets, strict=True):
                there = slice(asked, asked + len(wanted))
                places[b, there], targets[b, there] = path[-len(wanted) :], wanted
                owners[b] += [window] * len(wanted)
                asked += len(wanted)
    return Batch(tokens, positions, ends, places, targets, owners)


def _laid_out(row: Row, ends: np.ndarray) -> Iterator[tuple[Branch, np.ndarray]]:
    """Yield each branch and the places of its tokens in the row, and write into `ends` [T] where each token's subtree ends."""
    at = 0
    for tree in row.trees:
        path = np.zeros(0, np.int64)
        for branch in tree.branches:
            ends[path[branch.shared :]] = at  # no later branch goes on there
            path = np.concatenate([path[: branch.shared], np.arange(at, at + branch.size - branch.shared)])
            at += branch.size - branch.shared
            yield branch, path
        ends[path] = at
