"""`train.ema` in the step: the average is that of plain numpy, on any mesh, and changes nothing else."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_mling.config import (
    DataConfig,
    EmaConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from easylm_mling.model.params import parameter_count, to_flat
from easylm_mling.model.sharding import batch_sharding, make_mesh
from easylm_mling.training.ema import averaged
from easylm_mling.training.state import (
    abstract_state,
    freeze,
    init_params,
    init_state,
    init_trained,
    state_shardings,
)
from easylm_mling.training.step import jit_train_step

T = 8
EXPONENTIAL, MEAN, LATE = EmaConfig(0.75), EmaConfig(from_step=2), EmaConfig(0.75, 2)


def config_of(ema: EmaConfig | None, mesh=(1, 1, 1), lora: LoraConfig | None = None) -> RunConfig:
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(96, 32, 64, 2, 4, 2, 16),
        data=DataConfig("unused", {"a": SourceConfig(("x",), 1.0)}, sequence_length=T),
        train=TrainConfig(budget_tokens=8 * T * 100, batch_size=8, compute_dtype="float32", ema=ema),
        optimizer=OptimizerConfig(learning_rate=0.01),
        mesh=MeshConfig(*mesh),
        lora=lora,
    )


def batches(count: int, broken: int | None = None):
    rng = np.random.default_rng(0)
    for i in range(count):
        tokens = rng.integers(3, 96, (8, T + 1), dtype=np.int32)
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "loss_mask": np.full((8, T), np.nan if i == broken else 1.0, np.float32),
            "segment_ids": np.ones((8, T), np.int32),
            "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (8, T)).copy(),
            "source": np.zeros(8, np.int32),
        }


def states(config: RunConfig, broken: int | None = None) -> list:
    """The state at the beginning, and after each of five steps."""
    shape = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])

    def begin():
        base = freeze(init_params(config.model, 1), config.model, np.dtype(np.float32)) if config.lora else None
        return init_state(init_trained(config), config, base)

    with jax.set_mesh(mesh):
        state, step = jax.jit(begin, out_shardings=state_shardings(config, mesh))(), jit_train_step(config, mesh)
        seen = [jax.device_get(state)]
        for batch in batches(5, broken):
            state, _ = step(state, jax.device_put(batch, batch_sharding(mesh)))
            seen.append(jax.device_get(state))
    return seen


def expected(seen: list, ema: EmaConfig) -> list[dict]:
    """The average after each step in float64, from the parameters alone."""
    each = [{p: np.asarray(a, np.float64) for p, a in to_flat(state.params).items()} for state in seen]
    averages = each[: ema.from_step + 1]
    for step in range(ema.from_step + 1, len(each)):
        if ema.decay is None:
            window = each[ema.from_step : step + 1]
            averages.append({p: np.mean([params[p] for params in window], axis=0) for p in each[0]})
        else:
            averages.append({p: ema.decay * averages[-1][p] + (1 - ema.decay) * each[step][p] for p in each[0]})
    return averages


def assert_averages(seen: list, ema: EmaConfig):
    for state, average in zip(seen, expected(seen, ema), strict=True):
        flat = to_flat(state.average)
        assert flat.keys() == average.keys()
        for path, values in average.items():
            assert flat[path].dtype == np.float32
            np.testing.assert_allclose(flat[path], values, rtol=1e-6, atol=1e-8, err_msg=path)


@pytest.fixture(scope="module")
def plain():
    return states(config_of(None))


@pytest.mark.parametrize("ema", [EXPONENTIAL, MEAN, LATE], ids=["exponential", "mean", "late"])
def test_it_is_the_average_of_plain_numpy(ema):
    rng = np.random.default_rng(0)
    params = [{"w": rng.normal(size=(4, 3)).astype(np.float32)} for _ in range(8)]
    average, seen = params[0], [SimpleNamespace(params=params[0], average=params[0])]
    for step, now in enumerate(params[1:], 1):
        average = jax.device_get(jax.jit(averaged, static_argnums=3)(average, now, jnp.int32(step), ema))
        seen.append(SimpleNamespace(params=now, average=average))
    assert_averages(seen, ema)


def test_the_step_takes_the_parameters_that_it_leaves_and_changes_nothing_else(plain):
    seen = states(config_of(EXPONENTIAL))
    assert_averages(seen, EXPONENTIAL)
    jax.tree.map(np.testing.assert_array_equal, seen[-1]._replace(average={}), plain[-1])
    leaves = zip(jax.tree.leaves(seen[-1].average), jax.tree.leaves(seen[-1].params), strict=True)
    assert max(np.abs(a - p).max() for a, p in leaves) > 1e-3


@pytest.mark.slow
def test_sharded_it_is_the_same_and_lies_with_its_parameter(plain):
    config = config_of(EXPONENTIAL, (2, 2, 2))
    assert_averages(states(config), EXPONENTIAL)
    shardings = state_shardings(config, make_mesh(config.mesh, jax.devices()[:8]))
    assert shardings.average == shardings.params and len(to_flat(shardings.average)) == len(to_flat(plain[0].params))


def test_a_step_that_is_skipped_counts_with_the_parameters_that_it_left():
    seen = states(config_of(EXPONENTIAL), broken=2)
    assert int(seen[-1].skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, seen[3].params, seen[2].params)
    assert_averages(seen, EXPONENTIAL)


@pytest.mark.slow
def test_with_adapters_it_is_theirs_alone():
    lora = LoraConfig(rank=4, alpha=8.0)
    seen = states(config_of(EXPONENTIAL, lora=lora))
    assert_averages(seen, EXPONENTIAL)
    assert seen[-1].average.keys() == {"lora"} and seen[-1].averaged_weights.keys() == seen[-1].weights.keys()


def test_it_takes_four_bytes_a_parameter_and_without_it_none():
    config = config_of(EXPONENTIAL)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    # The plan compiles the step for these.
    with_it, without = (abstract_state(config_of(ema), mesh) for ema in (EXPONENTIAL, None))
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) for state in (with_it, without)]
    assert sizes[0] - sizes[1] == 4 * parameter_count(config.model)
    assert with_it.parts.keys() - without.parts.keys() == {"average"} and without.average == {}
