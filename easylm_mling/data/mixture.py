"""Which source each row of the run has, a row's arrays, and the counters of what a run has consumed.

Legend: V lanes, S sources, L languages of all sources, C counters, T tokens of a row. A round is one row of every lane.
All functions are pure, on numpy arrays, but for `mask_padding`.
"""

from collections.abc import Collection
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from easylm_mling.data.conversations.encoding import UNTRAINED
from easylm_mling.data.shuffle import seeded_bits, seeded_order
from easylm_mling.data.weights import ONE, MixingPlan
from easylm_mling.errors import ConfigError

# What the trainer has *consumed* in a lane of a source. First the cursor of its token stream: epoch, block, window,
# document in the window, token in the document. Then the ledger: rows that the plan assigned, tokens, documents begun,
# bad records of the windows entered, rows given in place of a source that was used up, padding, in tokens, of a stream's
# last row, and good records of the windows entered. See streams.StreamState.
COUNTERS = (
    "epoch",
    "block",
    "window",
    "document",
    "offset",
    "rows",
    "tokens",
    "documents",
    "bad",
    "extra",
    "padding",
    "good",
)
EPOCH, BLOCK, WINDOW, DOCUMENT, OFFSET, ROWS, TOKENS, DOCUMENTS, BAD, EXTRA, PADDING, GOOD = range(len(COUNTERS))

Batch = dict[str, np.ndarray]

# What all lanes together have consumed in a language of a source.
LANGUAGE_COUNTERS = ("tokens", "documents", "bad")


class DataState(NamedTuple):
    """What a run has consumed: `lanes`, int64 [V, S, C] (COUNTERS), and `languages`, int64 [L, 3] (LANGUAGE_COUNTERS).

    Languages are in the catalog's order, source after source. A host counts in its own lanes; of the other lanes it
    holds `rows`, `extra` and the cursors of pooled sources (data/pool.py), which all hosts know (see `whole_state`).
    """

    lanes: np.ndarray
    languages: np.ndarray

    def copy(self) -> "DataState":
        """Return a state with arrays of its own."""
        return DataState(self.lanes.copy(), self.languages.copy())


def batch_counts(plan: MixingPlan, planned: np.ndarray, rounds: int) -> list[list[int]]:
    """Return the rows of each source in each of a batch's `rounds`, from `planned`, int64 [V, S]: rows so far.

    The batch has each source's share of its rows to within one row, and so have all rows so far: rows lost by rounding
    down go to the sources furthest behind. Its rounds divide them as evenly as whole rows allow.
    """
    lanes, done = len(planned), int(planned.sum()) // len(planned)
    left = _whole_counts(
        plan.target(done), plan.target(done + rounds), rounds * lanes, lanes, planned.sum(axis=0).tolist()
    )
    by_round = []
    for rounds_left in range(rounds, 0, -1):
        counts = [rows // rounds_left for rows in left]
        by_remainder = sorted(range(len(left)), key=lambda s: (-(left[s] % rounds_left), s))
        for s in by_remainder[: lanes - sum(counts)]:
            counts[s] += 1
        left = [rows - count for rows, count in zip(left, counts, strict=True)]
        by_round.append(counts)
    return by_round


def next_round(
    plan: MixingPlan, seed: int, planned: np.ndarray, lanes_with_data: list[int], counts: list[int] | None = None
) -> np.ndarray:
    """Return the source of each lane's next row, int32 [V], from `planned`, int64 [V, S]: rows so far by lane and source.

    `counts`: the round's rows of each source, as batch_counts says; by default those of a batch of one round. The lane
    that is furthest behind in any source chooses first. So every lane sees the whole mixture, and all its blocks of every
    source are read.

    Only the first `lanes_with_data[s]` lanes have a block of source s. Sources with few such lanes are assigned first.
    Rows that those lanes cannot take go to the sources that are furthest behind in the other lanes.
    """
    lanes, sources = planned.shape
    done = int(planned.sum()) // lanes
    target = plan.target(done + 1)
    counts = list(batch_counts(plan, planned, 1)[0] if counts is None else counts)
    behind = np.array(target, np.int64) - (planned << 32)
    # A new permutation in each round breaks ties, or lanes that are equal would stay in step.
    rank = np.repeat(seeded_order(lanes, seed, "round", done), sources)
    assigned = [-1] * lanes
    for pair in np.lexsort((rank, -behind.reshape(-1), np.tile(lanes_with_data, lanes))).tolist():
        lane, source = divmod(pair, sources)
        if assigned[lane] < 0 and counts[source] and lane < lanes_with_data[source]:
            assigned[lane] = source
            counts[source] -= 1
    for lane in (v for v in range(lanes) if assigned[v] < 0):
        # A lane without any data is assigned a source, too: the loader then learns that all of them are used up.
        active = [s for s, share in enumerate(plan.shares_at(done)) if share]
        assigned[lane] = max(active, key=lambda s: (lane < lanes_with_data[s], int(behind[lane, s])))
    return np.array(assigned, np.int32)


def _whole_counts(before: list[int], after: list[int], total: int, lanes: int, rows: list[int]) -> list[int]:
    """Return the `total` rows by source between two targets of a lane: exact in Python's integers, ties to the first source."""
    due = [(end - start) * lanes for start, end in zip(before, after, strict=True)]
    counts = [share >> 32 for share in due]
    # Only a source whose share is not whole can ever need one more row.
    rounded = [s for s, share in enumerate(due) if share % ONE]
    deficit = {s: after[s] * lanes - ((rows[s] + counts[s]) << 32) for s in rounded}
    for s in sorted(rounded, key=lambda s: (-deficit[s], s))[: total - sum(counts)]:
        counts[s] += 1
    return counts


def substitute(shares: list[int], seed: int, lane: int, extra: np.ndarray, used_up: set[int]) -> int | None:
    """Return the source that gives a row in place of one that is used up in this lane, or None if all are.

    `extra`, int64 [S]: rows that the lane's sources gave in this way before. They divide such rows by their shares, to
    within a row. Each lane has another phase, so that not all of a batch turns to the same source.
    """
    phases = (seeded_bits(len(shares), seed, "substitute", lane) >> 32).tolist()
    left = [s for s, share in enumerate(shares) if share and s not in used_up]
    return min(left, key=lambda s: Fraction((int(extra[s]) << 32) + phases[s], shares[s]), default=None)


def row_arrays(tokens: np.ndarray, bos_id: int, eos_id: int = -1) -> dict[str, np.ndarray]:
    """Return the trainer's arrays, each [..., T], for `tokens`, int32 [..., T + 1]; the last token is a target only.

    tokens. targets: the next token. loss_mask, float32: 1. Both are 0 where the next token has UNTRAINED added to it, or
    begins another document, unless the one token `bos_id` also ends this one (`eos_id` is the same).
    segment_ids: from 1, one more at each document; 0 is padding. positions: from 0 at each document and at the row's
    start. All but the mask are int32.
    """
    following = tokens[..., 1:]
    inside = (following != (bos_id if bos_id != eos_id else -1)) & (following < UNTRAINED)
    inputs = tokens[..., :-1] & ~UNTRAINED
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
    # A row holds few documents: a loop over them costs little.
    for row, segments, positions in rows:
        bounds = [0, *(np.flatnonzero(row[1:] == bos_id) + 1).tolist(), length]
        for number, (begin, end) in enumerate(pairwise(bounds), 1):
            segments[begin:end] = number
            positions[begin:end] = index[: end - begin]
    return arrays


def mask_padding(batch: dict[str, np.ndarray], real: np.ndarray, pad_id: int):
    """Mask the tokens of a batch, in place, that lie behind the first `real`, int [rows], of each row's T + 1."""
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
    """Return the state of a run that has read nothing: own lane l starts at block l of every source."""
    state = np.zeros((lanes, sources, len(COUNTERS)), np.int64)
    state[own.start : own.stop, :, BLOCK] = np.arange(own.start, own.stop)[:, None]
    return DataState(state, np.zeros((languages, len(LANGUAGE_COUNTERS)), np.int64))


def own_state(state: DataState, lanes: int, sources: int, own: range, pooled: Collection[int] = ()) -> DataState:
    """Return a host's copy of a whole run's state: of other hosts' lanes what all hosts know, and zero for the rest.

    All know `rows`, `extra`, and the cursors of the sources `pooled` (their numbers).
    The host of lane 0 goes on with the counts by language. Raises ConfigError if the state is of another mixture.
    """
    whole = np.asarray(state.lanes)
    if whole.shape != (lanes, sources, len(COUNTERS)):
        raise ConfigError(
            f"data.lanes={lanes} with {sources} sources: the checkpoint's data state has shape {whole.shape}; "
            "lanes and sources are fixed for a run's life, so set them back, or start a new run_dir"
        )
    kept = np.zeros(whole.shape, np.int64)
    kept[..., [ROWS, EXTRA]] = whole[..., [ROWS, EXTRA]]
    for source in pooled:
        kept[:, source, :ROWS] = whole[:, source, :ROWS]
    kept[own.start : own.stop] = whole[own.start : own.stop]
    return DataState(kept, np.array(state.languages, np.int64) * (own.start == 0))


def whole_state(states: list[DataState]) -> DataState:
    """Return the run's state, made of all hosts' states of the same step."""
    return DataState(np.maximum.reduce([s.lanes for s in states]), np.sum([s.languages for s in states], axis=0))
