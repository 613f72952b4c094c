"""Which source each row of the run has, what a row's arrays are, and the counters that say where a run is.

Legend: V lanes, S sources, C counters, T tokens of a row. A round is one row of every lane. All here is pure functions
on numpy arrays.
"""

import numpy as np

from easylm_mling.config import ConfigError
from easylm_mling.data.blocks import seeded_order

# The state of a run is int64 [V, S, C]: for every lane and source, what the trainer has *consumed*. The cursor of its
# token stream (epoch, block, window, document in the window, token in the document), then the ledger:
# rows, tokens, documents begun, bad records of the windows entered.
COUNTERS = ("epoch", "block", "window", "document", "offset", "rows", "tokens", "documents", "bad")
EPOCH, BLOCK, WINDOW, DOCUMENT, OFFSET, ROWS, TOKENS, DOCUMENTS, BAD = range(len(COUNTERS))

_ONE = 1 << 32


def integer_weights(weights: list[float]) -> list[int]:
    """Weights as shares of 2**32 that sum to it exactly, so that schedules need no rounding. Zero stays zero."""
    total = sum(weights)
    exact = [weight / total * _ONE for weight in weights]
    shares = [int(x) for x in exact]
    by_remainder = sorted((i for i, w in enumerate(weights) if w > 0), key=lambda i: (shares[i] - exact[i], i))
    for n in range(_ONE - sum(shares)):
        shares[by_remainder[n % len(by_remainder)]] += 1
    return shares


def next_round(shares: list[int], seed: int, planned: np.ndarray) -> np.ndarray:
    """int32 [V]: the source of each lane's next row, given `planned`, int64 [V, S]: rows so far by lane and source.

    Every round has each source's share of V rows to within one row, and so have all rounds together: the rows left
    over by rounding down go to the sources furthest behind. Lanes then take turns, the one that is furthest behind in
    any source first, so that every lane sees the whole mixture, and so every lane's blocks of every source are read.
    """
    lanes, sources = planned.shape
    done = int(planned.sum()) // lanes
    counts = _round_counts(shares, lanes, done, planned.sum(axis=0).tolist())
    behind = np.array(shares, np.int64) * (done + 1) - (planned << 32)
    # Equal lanes are told apart by a new permutation each round, or they would all move in step.
    place = np.repeat(seeded_order(lanes, seed, "round", done), sources)
    dealt = [-1] * lanes
    for pair in np.lexsort((place, -behind.reshape(-1))).tolist():
        lane, source = divmod(pair, sources)
        if dealt[lane] < 0 and counts[source]:
            dealt[lane] = source
            counts[source] -= 1
    assert min(dealt) >= 0
    return np.array(dealt, np.int32)


def _round_counts(shares: list[int], lanes: int, done: int, rows: list[int]) -> list[int]:
    """Rows of each source in round number `done`; exact in Python's integers, ties to the first source."""
    counts = [share * lanes >> 32 for share in shares]
    # Only a source whose share of a round is not whole can ever be owed one more row.
    owed = [s for s, share in enumerate(shares) if share * lanes % _ONE]
    deficit = {s: shares[s] * lanes * (done + 1) - ((rows[s] + counts[s]) << 32) for s in owed}
    for s in sorted(owed, key=lambda s: (-deficit[s], s))[: lanes - sum(counts)]:
        counts[s] += 1
    return counts


def row_arrays(tokens: np.ndarray, bos_id: int) -> dict[str, np.ndarray]:
    """What the trainer gets of int32 [..., T + 1] of a token stream, the last only as a target: arrays [..., T].

    tokens; targets, the next token, and loss_mask (float32), both 0 where the next token begins another document;
    segment_ids from 1, one more at each document (0 is for padding); positions, from 0 at each document and at the
    row's start. All but the mask are int32.
    """
    inputs, following = tokens[..., :-1], tokens[..., 1:]
    begins = inputs == bos_id
    begins[..., 0] = True
    index = np.arange(inputs.shape[-1], dtype=np.int32)
    inside = following != bos_id
    return {
        "tokens": np.ascontiguousarray(inputs),
        "targets": np.where(inside, following, 0).astype(np.int32),
        "loss_mask": inside.astype(np.float32),
        "segment_ids": np.cumsum(begins, axis=-1, dtype=np.int32),
        "positions": index - np.maximum.accumulate(np.where(begins, index, 0), axis=-1),
    }


def initial_state(lanes: int, sources: int, own: range) -> np.ndarray:
    """State [V, S, C] of a run that has read nothing: own lane l starts at block l of every source."""
    state = np.zeros((lanes, sources, len(COUNTERS)), np.int64)
    state[own.start : own.stop, :, BLOCK] = np.arange(own.start, own.stop)[:, None]
    return state


def own_state(state: np.ndarray, lanes: int, sources: int, own: range) -> np.ndarray:
    """A host's copy of a whole run's state: of other hosts' lanes it keeps only `rows`, and the rest is zero.

    So the maximum over all hosts' states is the whole run's. Raises ConfigError if the state is of another mixture.
    """
    if state.shape != (lanes, sources, len(COUNTERS)):
        raise ConfigError(
            f"data.lanes={lanes} with {sources} sources: the checkpoint's data state has shape {state.shape}; "
            "lanes and sources are fixed for a run's life, so set them back, or start a new run_dir"
        )
    kept = np.zeros(state.shape, np.int64)
    kept[..., ROWS] = state[..., ROWS]
    kept[own.start : own.stop] = state[own.start : own.stop]
    return kept
