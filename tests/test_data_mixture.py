"""Rounds keep the shares, lanes do not go in step, and rows never let one document see another."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from easylm_mling.data.mixture import ROWS, DataState, initial_state, next_round, own_state, row_arrays, whole_state
from easylm_mling.data.weights import MixingPlan, integer_weights
from easylm_mling.errors import ConfigError

WEIGHTS = st.lists(st.floats(0, 1) | st.integers(0, 3), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-6)


def constant_plan(weights: list[float]) -> MixingPlan:
    """Of one stage, with the languages of every source as they come."""
    return MixingPlan((0,), (integer_weights(weights),), {})


def play(weights, lanes, rounds, seed=0):
    """Sources [rounds, V] of a run from its start."""
    plan, planned = constant_plan(weights), np.zeros((lanes, len(weights)), np.int64)
    assigned = []
    for _ in range(rounds):
        assigned.append(next_round(plan, seed, planned, [lanes] * len(weights)))
        planned[np.arange(lanes), assigned[-1]] += 1
    return np.array(assigned)


def counts(assigned, sources):
    return (assigned[..., None] == np.arange(sources)).sum(axis=-2)


@given(WEIGHTS)
def test_integer_weights_are_exact(weights):
    shares = integer_weights(weights)
    assert sum(shares) == 2**32
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share / 2**32 - weight / sum(weights)) < 1e-9
        assert share == 0 or weight > 0


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.integers(1, 24))
def test_every_round_and_all_rounds_so_far_are_within_a_row_of_the_shares(weights, lanes):
    assigned = play(weights, lanes, 60)
    share = np.array(weights) / sum(weights)
    each = counts(assigned, len(weights))
    assert (np.abs(each - share * lanes) < 1 + 1e-6).all()
    rounds = np.arange(1, 61)[:, None]
    assert (np.abs(np.cumsum(each, axis=0) - share * lanes * rounds) < 1.5).all()
    assert (each[:, share == 0] == 0).all()


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, st.integers(1, 16), st.integers(0, 5))
# Two lanes and shares of 1/2, 1/4, 1/4 resonate: assigned source by source, one lane never had the last one.
@example([2, 1, 1], 2, 0)
@example([0.7733, 0.8212, 0.3983, 0.2941], 3, 0)
def test_every_lane_has_the_mixture(weights, lanes, seed):
    assigned = play(weights, lanes, 150, seed)
    share = np.array(weights) / sum(weights)
    each_lane = np.cumsum(assigned[..., None] == np.arange(len(weights)), axis=0)
    assert np.abs(each_lane - share * np.arange(1, 151)[:, None, None]).max() < 3.5


def test_lanes_do_not_go_in_step():
    assigned = play([0.25, 0.25, 0.25, 0.25], 16, 64)
    agree = (assigned[:, :, None] == assigned[:, None, :]).mean(axis=0)
    assert agree[~np.eye(16, dtype=bool)].max() < 0.6
    assert (play([0.25] * 4, 16, 8, seed=1) != assigned[:8]).any()


def test_a_round_is_a_function_of_the_rows_so_far():
    plan, planned = constant_plan([5, 3, 1]), np.zeros((4, 3), np.int64)
    for row in play([5, 3, 1], 4, 50):
        np.testing.assert_array_equal(next_round(plan, 0, planned.copy(), [4] * 3), row)
        planned[np.arange(4), row] += 1


def test_changed_weights_are_approached_by_one_row_a_round():
    planned = counts(play([1, 0], 8, 20).T, 2)
    for _ in range(40):
        assigned = next_round(constant_plan([1, 1]), 0, planned, [8, 8])
        assert 3 <= (assigned == 1).sum() <= 5
        planned[np.arange(8), assigned] += 1


def test_rounds_are_exact_after_a_billion_rows():
    planned = np.tile(np.array([[250_000_000, 750_000_000]], np.int64), (8, 1))
    assert np.bincount(next_round(constant_plan([1, 3]), 0, planned, [8, 8])).tolist() == [2, 6]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 9), st.integers(8, 40))
def test_a_row_s_arrays_are_those_of_its_documents(lengths, skip, width):
    """Against a loop over the tokens, one at a time."""
    bos, eos = 2, 1
    stream = np.concatenate([[bos, *range(10, 10 + n), eos] for n in [*lengths, 60]]).astype(np.int32)[skip:]
    row = stream[: width + 1]
    got = row_arrays(np.stack([row, row]), bos)
    segment, position = 1, 0
    for t in range(width):
        if row[t] == bos and t:
            segment, position = segment + 1, 0
        crosses = row[t + 1] == bos
        want = dict(
            tokens=row[t],
            targets=0 if crosses else row[t + 1],
            loss_mask=1 - crosses,
            segment_ids=segment,
            positions=position,
        )
        assert {k: v[1, t] for k, v in got.items()} == want
        position += 1
    assert {k: v.dtype for k, v in got.items()} == {**dict.fromkeys(got, np.int32), "loss_mask": np.float32}


def test_a_state_of_another_mixture_is_refused():
    state = initial_state(4, 2, range(4))
    with pytest.raises(ConfigError, match=r"data.lanes=8 with 2 sources.*\(4, 2, 12\)"):
        own_state(state, 8, 2, range(8))


def test_the_hosts_states_together_are_the_whole_state():
    rng = np.random.default_rng(0)
    whole = DataState(*(rng.integers(0, 99, x.shape) for x in initial_state(6, 3, range(6), 4)))
    parts = [own_state(whole, 6, 3, r) for r in (range(0, 2), range(2, 3), range(3, 6))]
    assert all((p.lanes[..., ROWS] == whole.lanes[..., ROWS]).all() for p in parts)
    for got, want in zip(whole_state(parts), whole, strict=True):
        np.testing.assert_array_equal(got, want)
