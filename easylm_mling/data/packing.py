"""Whole conversations into rows: the oldest one first, then of the next few those that fill the row best.

What is taken of a sequence of documents is two numbers: a cursor, the oldest document that is left, and a mask of those
after it that are gone. So a row is a function of its beginning, and a few bytes resume it exactly.
"""

import numpy as np

# A document waits for at most so many that come after it. They fit the bits of an int64.
LOOKAHEAD = 62


def choose_next(ends: np.ndarray, cursor: int, taken: int, room: int, is_first: bool) -> int | None:
    """Return the document to put next into a row that has `room` tokens left, or None if none of the next ones fits.

    `ends`, int [documents]: where each ends in the tokens of all. `cursor` and `taken`: see `take`. Into an empty row goes
    the oldest one. Then it is the longer one of the two that together leave the least room, or the longest one that fits
    if that leaves no more. The earlier document wins a tie.
    """
    begin = int(ends[cursor - 1]) if cursor else 0
    lengths = np.diff(ends[cursor : cursor + LOOKAHEAD], prepend=begin).astype(np.int64)
    if is_first:
        return cursor if lengths[0] <= room else None
    left = [i for i in range(len(lengths)) if not taken >> i & 1 and lengths[i] <= room]
    if not left:
        return None
    # Stable: of equal lengths the earliest comes last, where the longest is looked for.
    order = np.array(left)[::-1][np.argsort(lengths[left][::-1], kind="stable")]
    rising = lengths[order]
    # For each one the longest that fits beside it, if that is a shorter one.
    beside = np.minimum(np.searchsorted(rising, room - rising, side="right"), np.arange(len(rising))) - 1
    together = rising + np.where(beside >= 0, rising[beside], 0)
    return cursor + int(order[len(order) - 1 - int(np.argmax(together[::-1]))])


def take(cursor: int, taken: int, document: int) -> tuple[int, int]:
    """Return cursor and mask after `document` is taken. Bit i of the mask is document cursor + i; bit 0 is never set."""
    taken |= 1 << (document - cursor)
    while taken & 1:
        taken >>= 1
        cursor += 1
    return cursor, taken


def whole_rows(ends: np.ndarray, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the tokens of up to `rows` rows of whole documents are, int64 [rows, length + 1], and their numbers.

    `ends`: where the documents end. Places that no token is at lie behind the end.
    """
    places, real, cursor, taken = [], [], 0, 0
    while cursor < len(ends) and len(places) < rows:
        row = np.zeros(0, np.int64)
        while cursor < len(ends):
            chosen = choose_next(ends, cursor, taken, length - len(row), not len(row))
            if chosen is None:
                break
            row = np.append(row, np.arange(ends[chosen - 1] if chosen else 0, ends[chosen]))
            cursor, taken = take(cursor, taken, chosen)
        places.append(np.pad(row, (0, length + 1 - len(row)), constant_values=ends[-1]))
        real.append(len(row))
    return np.array(places, np.int64).reshape(-1, length + 1), np.array(real, np.int64)
