"""Which source each row of the run has, a row's arrays, and the counters of what a run has consumed.

Legend: V lanes, S sources, C counters, T tokens of a row. A round is one row of every lane. All here is pure functions
on numpy arrays.
"""

from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from easylm_mling.data.shuffle import seeded_bits, seeded_order
from easylm_mling.data.weights import ONE, MixingPlan
from easylm_mling.errors import ConfigError

# For every lane and source, what the trainer has *consumed*. The cursor of its token stream (epoch, block, window,
# document in the window, token in the document), then the ledger: rows that the plan dealt, tokens, documents begun, bad
# records of the windows entered, rows taken in place of another source that was used up, and padding, in tokens, of a
# stream's last row.
COUNTERS = ("epoch", "block", "window", "document", "offset", "rows", "tokens", "documents", "bad", "extra", "padding")
EPOCH, BLOCK, WINDOW, DOCUMENT, OFFSET, ROWS, TOKENS, DOCUMENTS, BAD, EXTRA, PADDING = range(len(COUNTERS))

# For every language of every source, what all lanes together have consumed.
LANGUAGE_COUNTERS = ("tokens", "documents", "bad")


class DataState(NamedTuple):
    """What a run has consumed: `lanes`, int64 [V, S, C] (COUNTERS), and `languages`, int64 [L, 3] (LANGUAGE_COUNTERS).

    The languages of all sources stand one source after the other, as in the catalog. A host counts its own lanes; of
    the others it holds `rows` only: see `whole_state`.
    """

    lanes: np.ndarray
    languages: np.ndarray

    def copy(self) -> "DataState":
        return DataState(self.lanes.copy(), self.languages.copy())


def next_round(plan: MixingPlan, seed: int, planned: np.ndarray, lanes_with_data: list[int]) -> np.ndarray:
    """int32 [V]: the source of each lane's next row, given `planned`, int64 [V, S]: rows so far by lane and source.

    Every round has each source's share of V rows to within one row, and so have all rounds together: the rows left
    over by rounding down go to the sources furthest behind. Lanes then take turns, the one that is furthest behind in
    any source first, so that every lane sees the whole mixture, and so every lane's blocks of every source are read.

    Source s is dealt to the first `holders[s]` lanes only, for the others hold no block of it; such sources are dealt
    first, and what their lanes cannot take goes to the sources that are furthest behind in the other lanes.
    """
    lanes, sources = planned.shape
    done = int(planned.sum()) // lanes
    target = plan.target(done + 1)
    counts = _round_counts(plan.shares_at(done), lanes, target, planned.sum(axis=0).tolist())
    behind = np.array(target, np.int64) - (planned << 32)
    # Equal lanes are told apart by a new permutation each round, or they would all move in step.
    place = np.repeat(seeded_order(lanes, seed, "round", done), sources)
    dealt = [-1] * lanes
    for pair in np.lexsort((place, -behind.reshape(-1), np.tile(lanes_with_data, lanes))).tolist():
        lane, source = divmod(pair, sources)
        if dealt[lane] < 0 and counts[source] and lane < lanes_with_data[source]:
            dealt[lane] = source
            counts[source] -= 1
    for lane in (v for v in range(lanes) if dealt[v] < 0):
        # A lane that holds nothing at all is dealt something, too: it will find out that all is used up.
        due = [s for s, share in enumerate(plan.shares_at(done)) if share]
        dealt[lane] = max(due, key=lambda s: (lane < lanes_with_data[s], int(behind[lane, s])))
    return np.array(dealt, np.int32)


def _round_counts(shares: list[int], lanes: int, target: list[int], rows: list[int]) -> list[int]:
    """Rows of each source in a round that ends at `target`; exact in Python's integers, ties to the first source."""
    counts = [share * lanes >> 32 for share in shares]
    # Only a source whose share of a round is not whole can ever be owed one more row.
    owed = [s for s, share in enumerate(shares) if share * lanes % ONE]
    deficit = {s: target[s] * lanes - ((rows[s] + counts[s]) << 32) for s in owed}
    for s in sorted(owed, key=lambda s: (-deficit[s], s))[: lanes - sum(counts)]:
        counts[s] += 1
    return counts


def substitute(shares: list[int], seed: int, lane: int, extra: np.ndarray, spent: set[int]) -> int | None:
    """The source that gives a row in place of one that is used up in this lane, or None if all are.

    `extra`, int64 [S]: rows the lane's sources gave so before. They share such rows out by their shares, to within a
    row; phases that differ between lanes keep a whole batch from turning to the same one.
    """
    phases = (seeded_bits(len(shares), seed, "substitute", lane) >> 32).tolist()
    left = [s for s, share in enumerate(shares) if share and s not in spent]
    return min(left, key=lambda s: Fraction((int(extra[s]) << 32) + phases[s], shares[s]), default=None)


def row_arrays(tokens: np.ndarray, bos_id: int) -> dict[str, np.ndarray]:
    """What the trainer gets of int32 [..., T + 1] of a token stream, the last only as a target: arrays [..., T].

    tokens; targets, the next token, and loss_mask (float32), both 0 where the next token begins another document;
    segment_ids from 1, one more at each document (0 is for padding); positions, from 0 at each document and at the
    row's start. All but the mask are int32.
    """
    inputs, following = tokens[..., :-1], tokens[..., 1:]
    inside = following != bos_id
    arrays = {
        "tokens": np.ascontiguousarray(inputs),
        "targets": following * inside,
        "loss_mask": inside.astype(np.float32),
        "segment_ids": np.empty(inputs.shape, np.int32),
        "positions": np.empty(inputs.shape, np.int32),
    }
    length = inputs.shape[-1]
    index = np.arange(length, dtype=np.int32)
    rows = zip(*(arrays[k].reshape(-1, length) for k in ("tokens", "segment_ids", "positions")), strict=True)
    # A row holds few documents, so each is filled in turn.
    for row, segments, positions in rows:
        bounds = [0, *(np.flatnonzero(row[1:] == bos_id) + 1).tolist(), length]
        for number, (begin, end) in enumerate(pairwise(bounds), 1):
            segments[begin:end] = number
            positions[begin:end] = index[: end - begin]
    return arrays


def mask_padding(batch: dict[str, np.ndarray], real: np.ndarray, pad_id: int):
    """Take what lies behind the first `real`, int [rows], tokens of each row's T + 1 out of a batch, in place."""
    length = batch["tokens"].shape[-1]
    if np.all(real > length):
        return
    index = np.arange(length)
    after, last = index >= real[:, None], index + 1 >= real[:, None]
    batch["tokens"][after] = pad_id
    for key in ("segment_ids", "positions"):
        batch[key][after] = 0
    for key in ("targets", "loss_mask"):
        batch[key][last] = 0


def initial_state(lanes: int, sources: int, own: range, languages: int = 1) -> DataState:
    """The state of a run that has read nothing: own lane l starts at block l of every source."""
    state = np.zeros((lanes, sources, len(COUNTERS)), np.int64)
    state[own.start : own.stop, :, BLOCK] = np.arange(own.start, own.stop)[:, None]
    return DataState(state, np.zeros((languages, len(LANGUAGE_COUNTERS)), np.int64))


def own_state(state: DataState, lanes: int, sources: int, own: range) -> DataState:
    """A host's copy of a whole run's state: of other hosts' lanes it keeps only `rows`, and the rest is zero.

    What was counted by language before stays with the host of lane 0. Raises ConfigError if the state is of another
    mixture.
    """
    whole = np.asarray(state.lanes)
    if whole.shape != (lanes, sources, len(COUNTERS)):
        raise ConfigError(
            f"data.lanes={lanes} with {sources} sources: the checkpoint's data state has shape {whole.shape}; "
            "lanes and sources are fixed for a run's life, so set them back, or start a new run_dir"
        )
    kept = np.zeros(whole.shape, np.int64)
    kept[..., ROWS] = whole[..., ROWS]
    kept[own.start : own.stop] = whole[own.start : own.stop]
    return DataState(kept, np.array(state.languages, np.int64) * (own.start == 0))


def whole_state(states: list[DataState]) -> DataState:
    """The run's state out of all hosts' states of the same step."""
    return DataState(np.maximum.reduce([s.lanes for s in states]), np.sum([s.languages for s in states], axis=0))
