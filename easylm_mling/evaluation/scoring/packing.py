"""Pack many short sequences into few rows: each is a segment of its own, so that none sees another.

A query asks for the log-probability of one token after one position. Requests that read the same tokens share a segment: all
one-token choices of a question are one forward pass.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from easylm_mling.evaluation.scoring.windows import Window

_FULL = 0.9  # of a row's tokens
_NARROWEST, _UNIT = 128, 512  # of rows, in tokens: widths are powers of two, or whole units where the window ends


class Segment(NamedTuple):
    """Tokens to read, and for each of `windows` (numbers into a list of windows) what to predict at its end."""

    inputs: bytes  # of int32, as a window's
    windows: list[int]
    targets: list[tuple[int, ...]]

    @property
    def size(self) -> int:
        """How many tokens are read."""
        return len(self.inputs) // 4

    @property
    def queries(self) -> int:
        """How many tokens are asked for."""
        return sum(map(len, self.targets))

    def only(self, windows: set[int]) -> "Segment":
        """Return the segment with those of its windows that are among `windows`."""
        kept = [(n, t) for n, t in zip(self.windows, self.targets, strict=True) if n in windows]
        return Segment(self.inputs, [n for n, _ in kept], [t for _, t in kept])


@dataclass
class Row:
    """Segments side by side in `width` tokens."""

    width: int
    segments: list[Segment] = field(default_factory=list)


class Batch(NamedTuple):
    """Arrays of one forward pass, int32: tokens, positions and segments [B, T]; places and targets of queries [B, Q].

    `owners` has for each query, row by row, the number of its window.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    owners: list[list[int]]


def segments_of(windows: Sequence[Window]) -> list[Segment]:
    """Return one segment for all windows that read the same tokens, in an order that depends on nothing else."""
    by_inputs: dict[bytes, Segment] = {}
    for number, window in enumerate(windows):
        segment = by_inputs.setdefault(window.inputs, Segment(window.inputs, [], []))
        segment.windows.append(number)
        segment.targets.append(window.targets)
    return sorted(by_inputs.values(), key=lambda s: (-s.size, s.inputs))


def row_width(tokens: int, narrowest: int, length: int) -> int:
    """Return the width of a row for a segment of `tokens`: a power of two, at least `narrowest`, at most about `length`."""
    widest = -(-length // _UNIT) * _UNIT if length > _UNIT else max(_NARROWEST, 1 << (length - 1).bit_length())
    return min(widest, max(narrowest, 1 << (tokens - 1).bit_length()))


def pack(segments: Sequence[Segment], narrowest: int, length: int) -> list[Row]:
    """Put each segment, longest first, into the fullest row that has room for it, or into a new row.

    With `narrowest` 0 every segment has a row to itself.
    """
    rows: list[Row] = []
    if not narrowest:
        return [Row(row_width(s.size, _NARROWEST, length), [s]) for s in segments]
    rooms: list[tuple[int, int, int]] = []  # (tokens left, how many queries it has, row), sorted
    for segment in segments:
        size = segment.size
        place = bisect_left(rooms, (size, 0, 0))
        # Queries take memory as tokens do: a row has at most as many as tokens, unless one segment alone has more.
        while place < len(rooms) and rooms[place][1] + segment.queries > rows[rooms[place][2]].width:
            place += 1
        if place == len(rooms):
            rows.append(Row(row_width(size, narrowest, length)))
            left, queries, row = rows[-1].width, 0, len(rows) - 1
        else:
            left, queries, row = rooms.pop(place)
        rows[row].segments.append(segment)
        if left > size:
            insort(rooms, (left - size, queries + segment.queries, row))
    return rows


def pack_tightly(segments: Sequence[Segment], widest: int, length: int) -> list[Row]:
    """Pack into the narrowest rows, up to `widest`, of which nine tenths are real tokens, or into the best filled ones.

    A token's attention costs what its row is wide. With `widest` 0 every segment has a row to itself. Segments longer than `widest` have wider rows.
    """
    tried: list[tuple[float, list[Row]]] = []
    narrowest = min(widest, 2 * _NARROWEST)
    while not tried or (0 < narrowest <= widest and tried[-1][0] < _FULL):
        rows = pack(segments, narrowest, length)
        tried.append((sum(s.size for s in segments) / max(1, sum(r.width for r in rows)), rows))
        narrowest *= 2
    return max(tried, key=lambda t: t[0])[1]


def batches_of(rows: Sequence[Row], tokens: int, shards: int) -> list[list[Row]]:
    """Group rows of one width, widest first: about `tokens` to a batch, and a multiple of `shards` rows.

    What is missing in a last batch is filled up with empty rows.
    """
    batches = []
    for width in sorted({r.width for r in rows}, reverse=True):
        same = [r for r in rows if r.width == width]
        most = max(1, tokens // width // shards) * shards
        # One shape for one width, as each further one would be compiled, too; and even batches, so that little is empty.
        batches_of_width = -(-len(same) // most)
        count = -(-len(same) // (batches_of_width * shards)) * shards
        for start in range(0, len(same), count):
            part = same[start : start + count]
            batches.append(part + [Row(width) for _ in range(count - len(part))])
    return batches


def arrays(rows: Sequence[Row]) -> Batch:
    """Lay rows out as arrays. Padding has segment 0 and token 0; a padded query asks for token 0 after position 0."""
    B, T = len(rows), rows[0].width
    most = max(1, *(sum(s.queries for s in r.segments) for r in rows))
    Q = max(16, 1 << (most - 1).bit_length())
    tokens, positions, segments = (np.zeros((B, T), np.int32) for _ in range(3))
    places, targets = (np.zeros((B, Q), np.int32) for _ in range(2))
    owners: list[list[int]] = []
    for b, row in enumerate(rows):
        at, asked = 0, 0
        owners.append([])
        for number, segment in enumerate(row.segments, 1):
            n = segment.size
            here = slice(at, at + n)
            tokens[b, here] = np.frombuffer(segment.inputs, np.int32)
            positions[b, here], segments[b, here] = np.arange(n), number
            for window, wanted in zip(segment.windows, segment.targets, strict=True):
                there = slice(asked, asked + len(wanted))
                places[b, there] = np.arange(at + n - len(wanted), at + n)
                targets[b, there] = wanted
                owners[b] += [window] * len(wanted)
                asked += len(wanted)
            at += n
    return Batch(tokens, positions, segments, places, targets, owners)
