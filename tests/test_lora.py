"""LoRA inside a step: it begins at the base, trains adapters alone, and gives one result on any mesh."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from processes import ROOT
from test_step import assert_close, make_batch, make_config

from easylm_mling.config import PROJECTIONS, LoraConfig, MeshConfig, ModelConfig, RunConfig, from_tree
from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.errors import ConfigError
from easylm_mling.model.flops import model_flops
from easylm_mling.model.lora import Adapters, dropout_key, factor_specs, init_adapters, merged, of_layer
from easylm_mling.model.params import adapter_table, looked_up_only, parameter_count, to_flat, trained_count
from easylm_mling.model.sharding import adapter_shardings, batch_sharding, check_run, make_mesh
from easylm_mling.training.state import abstract_batch, abstract_state, freeze, init_params, init_state, state_shardings
from easylm_mling.training.step import eval_step, jit_train_step, step_config

LORA = LoraConfig(rank=4, alpha=8)


def config_with(lora: LoraConfig | None = LORA, model: ModelConfig | None = None, **others) -> RunConfig:
    config = make_config(**others)
    return replace(config, lora=lora, model=model or config.model)


def run(config: RunConfig, batches, adapters: dict | None = None):
    """(final state, metrics of each step), from a seeded base and fresh `adapters` or these."""
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor])
    check_run(config, mesh)

    def begin():
        base = freeze(init_params(config.model, 7), config.model, jnp.dtype(config.train.compute_dtype))
        assert config.lora
        return init_state(adapters or init_adapters(config.model, config.lora, config.train.seed), config, base)

    with jax.set_mesh(mesh):
        state = jax.jit(begin, out_shardings=state_shardings(config, mesh))()
        step, seen = jit_train_step(config, mesh), []
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
            seen.append(jax.device_get(metrics))
    return jax.device_get(state), seen


def evaluated(weights: dict, c) -> tuple:
    return jax.device_get(jax.jit(partial(eval_step, c=c))(weights, make_batch(0)))


def scattered(adapters: dict) -> dict:
    """Adapters whose B is not zero, so that they change the model."""
    flat, _ = jax.tree.flatten(adapters)
    noisy = [a + 0.1 * jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(flat)]
    return jax.tree.unflatten(jax.tree.structure(adapters), noisy)


@pytest.fixture(scope="module")
def reference():
    return run(config_with(), [make_batch(0), make_batch(1)])


def test_training_begins_at_the_base(reference):
    config = config_with()
    c, base = step_config(config, make_mesh(config.mesh, jax.devices()[:1])), init_params(config.model, 7)
    plain = step_config(replace(config, lora=None), make_mesh(config.mesh, jax.devices()[:1]))
    adapters = init_adapters(config.model, LORA, 0)
    losses = [evaluated(weights, of) for weights, of in (({**base, **adapters}, c), (base, plain))]
    jax.tree.map(np.testing.assert_array_equal, *losses)
    np.testing.assert_allclose(reference[1][0]["loss_sum"], losses[0][0], rtol=1e-6)
    assert reference[1][1]["loss_sum"].sum() != reference[1][0]["loss_sum"].sum()


def test_fresh_factors_are_those_of_peft():
    """A is uniform within 1/sqrt(in) and fills the interval, B is zero; layers and projections draw apart."""
    m = make_config().model
    flat, rows = to_flat(init_adapters(m, LORA, 0)), {p.path: p for p in adapter_table(m, LORA)}
    assert flat.keys() == rows.keys() and len(flat) == 14
    for path, a in flat.items():
        assert a.shape == rows[path].shape and a.dtype == jnp.float32
        bound = rows[path].hf_shape[1] ** -0.5
        assert (
            not a.any() if path.endswith(".b") else 0.9 * bound < np.abs(a).max() <= bound and abs(a.mean()) < bound / 5
        )
    assert (
        len({a[layer].ravel()[:4].tobytes() for path, a in flat.items() if path.endswith(".a") for layer in (0, 1)})
        == 14
    )
    again = to_flat(init_adapters(m, LORA, 1))
    assert not np.array_equal(flat["lora.layers.q_proj.a"], again["lora.layers.q_proj.a"])


def test_adapters_beside_kernels_are_their_merge():
    config, model = config_with(replace(LORA, rslora=True)), make_config().model
    c, base = step_config(config, make_mesh(config.mesh, jax.devices()[:1])), init_params(model, 7)
    plain = step_config(replace(config, lora=None), make_mesh(config.mesh, jax.devices()[:1]))
    assert config.lora
    adapters = scattered(init_adapters(model, config.lora, 0))
    whole = merged(base, adapters, model, config.lora)
    changed = {path for path, a in to_flat(whole).items() if not np.array_equal(a, to_flat(base)[path])}
    assert {path.rpartition(".")[2] for path in changed} == {*PROJECTIONS}
    beside, inside, before = (
        evaluated(weights, of)[0] for weights, of in (({**base, **adapters}, c), (whole, plain), (base, plain))
    )
    np.testing.assert_allclose(beside, inside, rtol=1e-5)
    assert np.abs(beside - before).max() > 1e-3 * np.abs(before).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", [p if p == "k_proj" else pytest.param(p, marks=pytest.mark.slow) for p in PROJECTIONS])
def test_each_projection_alone_is_trained(name):
    config = config_with(replace(LORA, projections=(name,)))
    state, _ = run(config, [make_batch(0)])
    assert {path.split(".")[2] for path in to_flat(state.params)} == {name}
    assert state.params["lora"]["layers"][name]["b"].any()


@pytest.mark.parametrize(
    "mesh, accumulation, remat",
    [
        ((2, 2, 2), 2, "full"),
        pytest.param((1, 4, 1), 1, "full", marks=pytest.mark.slow),
        pytest.param((1, 1, 1), 4, "save_dots", marks=pytest.mark.slow),
        pytest.param((1, 1, 1), 1, "none", marks=pytest.mark.slow),
    ],
)
def test_mesh_microbatches_and_remat_change_nothing(reference, mesh, accumulation, remat):
    config = config_with(mesh=mesh, accumulation=accumulation)
    state, metrics = run(replace(config, train=replace(config.train, remat=remat)), [make_batch(0), make_batch(1)])
    assert_close(metrics, reference[1], 1e-4)
    assert_close(state.optimizer[0].mu, reference[0].optimizer[0].mu, 1e-6)


def test_the_base_stays_and_has_no_moments(reference):
    state, config = reference[0], config_with()
    begun = jax.jit(partial(init_params, config.model, 7))()
    jax.tree.map(np.testing.assert_array_equal, state.frozen, jax.device_get(begun))
    size = trained_count(config.model, LORA)
    assert size == 4 * 2 * (2 * 96 + 2 * 64 + 3 * 96) < parameter_count(config.model)
    assert sum(a.size for a in jax.tree.leaves(state.params)) == size
    assert sum(a.size for a in jax.tree.leaves(state.optimizer)) == 2 * size + 1


@pytest.mark.slow
def test_a_base_in_bfloat16_is_half_as_large_and_the_forward_pass_has_the_same_bits():
    config = config_with()
    config = replace(config, train=replace(config.train, compute_dtype="bfloat16"))
    base = init_params(config.model, 7)
    narrow = freeze(base, config.model, jnp.bfloat16)
    kept = {path for path, a in to_flat(narrow).items() if a.dtype == jnp.float32}
    assert {path for path in to_flat(base) if "norm" in path} == kept
    adapters = scattered(init_adapters(config.model, LORA, 0))
    c = step_config(config, make_mesh(config.mesh, jax.devices()[:1]))
    wide, half = (evaluated({**b, **adapters}, c) for b in (base, narrow))
    jax.tree.map(np.testing.assert_array_equal, wide, half)


def products(config: RunConfig) -> list[set[int]]:
    """The sizes of the results of all matrix products in the compiled step."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        text = (
            jit_train_step(config, mesh)
            .lower(abstract_state(config, mesh), abstract_batch(config, mesh))
            .compile()
            .as_text()
        )
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", text)
    assert len(shapes) > 20
    return [{int(n) for n in shape.split(",") if n} for shape in shapes]


def test_no_gradient_of_the_base_is_computed():
    """Neither of the head [V, D] nor of a kernel [F, D], in the optimised program; without adapters there are both."""
    model = replace(make_config().model, vocab_size=97, intermediate_size=67)
    for lora, there in ((LORA, False), (None, True)):
        of_weights = [sizes for sizes in products(config_with(lora, model)) if sizes in ({97, 32}, {67, 32})]
        assert bool(of_weights) is there, of_weights


def test_dropout_is_drawn_anew_for_each_step_microbatch_layer_and_projection():
    x = jnp.ones((2, 8, 32))
    lora = replace(LORA, dropout=0.5)

    def mask(name="q_proj", seed=0, step=0, microbatch=0, layer=0):
        adapters = Adapters(lora, {}, dropout_key(seed, step, microbatch))
        return np.asarray(of_layer(adapters, ({}, jnp.int32(layer)), None)._dropout(name, x))

    first = mask()
    assert {*np.unique(first)} == {0.0, 2.0} and abs(first.mean() - 1) < 0.15
    np.testing.assert_array_equal(first, mask())
    others: list[dict[str, Any]] = [dict(name="k_proj"), dict(seed=1), dict(step=1), dict(microbatch=1), dict(layer=1)]
    for other in others:
        assert not np.array_equal(first, mask(**other)), other


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_mesh_and_is_off_in_evaluation():
    lora = replace(LORA, dropout=0.3)
    adapters = scattered(init_adapters(make_config().model, lora, 0))
    one, metrics = run(config_with(lora, accumulation=2), [make_batch(0), make_batch(1)], adapters)
    other, others = run(config_with(lora, mesh=(2, 2, 2), accumulation=2), [make_batch(0), make_batch(1)], adapters)
    assert_close(others, metrics, 1e-4)
    assert_close(other.optimizer[0].mu, one.optimizer[0].mu, 1e-6)
    without, plain = run(config_with(accumulation=2), [make_batch(0)], adapters)
    assert np.abs(plain[0]["loss_sum"] - metrics[0]["loss_sum"]).max() > 1e-3
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    weights = {**without.frozen, **adapters}
    kept, off = (evaluated(weights, step_config(config_with(of), mesh)) for of in (lora, LORA))
    jax.tree.map(np.testing.assert_array_equal, kept, off)


def test_long_sides_are_cut_over_fsdp_where_they_divide():
    m = make_config().model

    def spec(mesh, path):
        return to_flat(adapter_shardings(m, LORA, make_mesh(MeshConfig(*mesh))))[f"lora.layers.{path}"].spec

    assert spec((2, 2, 2), "q_proj.a") == P(None, None, "fsdp")
    assert spec((2, 2, 2), "q_proj.b") == P(None, "tensor", "fsdp", None)
    assert spec((2, 2, 2), "o_proj.a") == P(None, None, "tensor", "fsdp")
    assert spec((2, 2, 2), "down_proj.a") == P(None, None, ("tensor", "fsdp"))
    assert spec((2, 2, 2), "up_proj.b") == P(None, ("tensor", "fsdp"), None)
    odd = replace(m, head_dim=6, intermediate_size=12)
    flat = to_flat(adapter_shardings(odd, LORA, make_mesh(MeshConfig(1, 4, 2))))
    assert flat["lora.layers.q_proj.b"].spec == P(None, "tensor", None, None)
    assert flat["lora.layers.up_proj.b"].spec == P(None, "tensor", None)


def test_the_specs_of_factors_follow_from_those_of_kernels():
    assert factor_specs("btnh,dnh->btd") == ("btnh,rnh->btr", "btr,dr->btd")
    assert factor_specs("btd,fd->btf") == ("btd,rd->btr", "btr,fr->btf")


# Millions of trained parameters with rank 8, 16, 32, 64 and 256 on all seven projections, and with rank 32 on attention.
SIZES = {
    "gemma-7b": (25, 50, 100, 200, 800, 25.7),
    "gemma-2-9b": (27, 54, 108, 216, 864, 35.8),
    "gemma-3-4b": (15, 30, 60, 119, 477, 17.8),
    "llama-3-8b": (21, 42, 84, 168, 671, 27.3),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_work_of_published_models(name):
    m = from_tree(ModelConfig, read_yaml((ROOT / "configs" / "model" / f"{name}.yaml").read_bytes())["model"])
    *whole, attention = SIZES[name]
    for rank, millions in zip((8, 16, 32, 64, 256), whole, strict=True):
        assert trained_count(m, LoraConfig(rank=rank)) / 1e6 == pytest.approx(millions, abs=0.5)
    assert trained_count(m, LoraConfig(rank=32, projections=PROJECTIONS[:4])) / 1e6 == pytest.approx(
        attention, abs=0.05
    )
    # Of the base two FLOPs for each parameter and token fall away, those of its own gradient.
    less, lora = 2 * (parameter_count(m) - looked_up_only(m)), LoraConfig(rank=32)
    assert model_flops(m, 1000) - model_flops(m, 1000, lora) == pytest.approx(
        1000 * (less - 6 * trained_count(m, lora))
    )


WRONG = [
    ({"rank": 33}, "lora.rank=33 is larger than a side of q_proj, which has 32"),
    ({"rank": 0}, "lora.rank=0 must be positive"),
    ({"dropout": 1.0}, "lora.dropout=1.0 must be zero or more, and below 1"),
    ({"alpha": 0.0}, "lora.alpha=0.0 must be a positive"),
    ({"projections": ("qproj",)}, "no projection 'qproj'; did you mean 'q_proj'?"),
    ({"projections": ()}, "lora.projections is empty"),
    ({"projections": ("q_proj", "q_proj")}, "repeats one"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ConfigError) as caught:
        config_with(replace(LORA, **change))
    assert message in str(caught.value) and "\n" not in str(caught.value)
