"""The guards of a step: what they let pass, what enters their window, and that a spike teaches nothing."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import compiled, make_batch, make_config

from easylm_mling.config import TrainConfig
from easylm_mling.errors import ConfigError
from easylm_mling.model.sharding import batch_sharding, make_mesh
from easylm_mling.training.spike_guard import ACCEPTED, NOT_FINITE, SPIKE, WINDOW, judge, nothing_recent


def judged(losses, norms=None, sigmas=6.0):
    """The verdict on each step, the limits at it, and the window after all."""
    step, recent, seen = jax.jit(partial(judge, sigmas=sigmas)), nothing_recent(), []
    for loss, norm in zip(losses, norms if norms is not None else np.ones(len(losses)), strict=True):
        verdict, limits, recent = step(recent, jnp.float32(loss), jnp.float32(norm))
        seen.append((int(verdict), np.asarray(limits)))
    return [v for v, _ in seen], [x for _, x in seen], jax.device_get(recent)


def steady(count, seed=0):
    return np.random.default_rng(seed).normal(3, 0.1, count).astype(np.float32)


def test_the_limit_is_so_many_deviations_above_the_last_steps():
    losses, norms = steady(300), steady(300, 1)
    verdicts, limits, recent = judged(losses, norms)
    assert set(verdicts) == {ACCEPTED} and recent.count == 300
    for step in (64, 100, 200, 299):
        last = np.stack([losses, norms])[:, max(0, step - WINDOW) : step].astype(np.float64)
        np.testing.assert_allclose(limits[step], last.mean(1) + 6 * last.std(1), rtol=1e-5)
    assert (
        np.isinf(limits[63]).all()
        and np.sort(recent.values).tolist() == np.sort([losses[-128:], norms[-128:]]).tolist()
    )


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_spike_of_either_is_skipped_and_does_not_hide_the_next(which):
    losses, norms = steady(103), steady(103, 1)
    {"loss": losses, "norm": norms}[which][[100, 102]] = 1000, 5
    verdicts, limits, recent = judged(losses, norms)
    assert verdicts == [ACCEPTED] * 100 + [SPIKE, ACCEPTED, SPIKE]
    # It entered as the limit that it passed.
    row = ["loss", "norm"].index(which)
    assert recent.values[row, 100] == limits[100][row] < 4
    assert judged(losses, norms, sigmas=0.0)[0] == [ACCEPTED] * 103


def test_what_is_not_finite_is_no_spike_and_never_enters():
    losses, norms = steady(110), steady(110, 1)
    losses[[80, 81]], norms[[82, 83]] = (np.nan, np.inf), (np.nan, -np.inf)
    verdicts, _, recent = judged(losses, norms)
    assert [i for i, v in enumerate(verdicts) if v == NOT_FINITE] == [80, 81, 82, 83]
    clean = judged(np.delete(losses, range(80, 84)), np.delete(norms, range(80, 84)))
    assert set(clean[0]) == {ACCEPTED}
    jax.tree.map(np.testing.assert_array_equal, recent, clean[2])


def test_a_level_that_lasts_is_learnt():
    verdicts, _, _ = judged([*steady(128), *(steady(128) + 0.7)])
    assert 1 <= verdicts.count(SPIKE) <= 3 and set(verdicts[-100:]) == {ACCEPTED}


@pytest.mark.parametrize("deviation", [0.1, 0.02, 0.01])
@pytest.mark.parametrize("rise", [0.3, 0.7, 2.0])
def test_a_lasting_rise_never_skips_as_many_in_a_row_as_stop_a_run(deviation, rise):
    base = 3 + (steady(256) - 3) * np.float32(deviation / 0.1)
    verdicts, _, _ = judged([*base[:128], *(base[128:] + np.float32(rise))])
    in_a_row = max(len(run) for run in "".join(map(str, verdicts)).replace("1", "0").split("0"))
    assert in_a_row < TrainConfig(budget_tokens=1).max_skipped_in_a_row and set(verdicts[-100:]) == {ACCEPTED}


def test_a_step_that_spikes_changes_nothing_and_is_counted_apart():
    """Compiled with the guard, on a mesh: a batch ten times harder than those of the window."""
    config = make_config((2, 2, 2))
    guarded = replace(config, train=replace(config.train, spike_sigmas=6.0))
    easy = make_batch(0) | {"targets": np.full((8, 16), 7, np.int32)}
    nan = easy | {"loss_mask": np.full((8, 16), np.nan, np.float32)}
    hard = make_batch(1) | {"targets": np.full((8, 16), 9, np.int32)}
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        start, step = compiled(guarded, mesh)
        states, metrics = [start()], []
        for batch in [*[easy] * 70, hard, nan, easy]:
            # The step takes its state's memory.
            state, seen = step(jax.tree.map(jnp.copy, states[-1]), jax.device_put(batch, batch_sharding(mesh)))
            states, metrics = [*states[-3:], state], [*metrics, seen]
    assert [int(m["verdict"]) for m in metrics[-4:]] == [ACCEPTED, SPIKE, NOT_FINITE, ACCEPTED]
    assert [int(m["skipped_in_a_row"]) for m in metrics[-4:]] == [0, 1, 2, 0]
    assert (int(state.skipped), int(state.spikes), int(state.optimizer[0].count)) == (2, 1, 71)
    before, *rejected, after = [(s.params, s.optimizer) for s in jax.device_get(states)]
    for params_and_moments in rejected:
        jax.tree.map(np.testing.assert_array_equal, params_and_moments, before)
    assert not np.array_equal(after[0]["norm"], before[0]["norm"])


def test_a_threshold_that_would_skip_ordinary_steps_is_refused():
    for sigmas in (-1.0, 1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="train.spike_sigmas"):
            TrainConfig(budget_tokens=1, spike_sigmas=sigmas)
