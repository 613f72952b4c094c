"""Properties of the training step: one result whatever the mesh or the microbatches, and nothing learnt from a NaN."""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easylm_mling.config import (
    DataConfig,
    Duration,
    EarlierBatchSize,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from easylm_mling.errors import ConfigError
from easylm_mling.model.attention import cudnn_attention
from easylm_mling.model.decoder import ForwardOptions
from easylm_mling.model.params import to_flat
from easylm_mling.model.sharding import batch_sharding, check_run, make_mesh
from easylm_mling.model.splash_attention import splash_attention
from easylm_mling.training.optimizer import decay_mask, make_optimizer, make_schedule
from easylm_mling.training.state import (
    abstract_batch,
    abstract_state,
    init_params,
    init_state,
    model_graph,
    state_shardings,
)
from easylm_mling.training.step import attention_on, eval_step, jit_eval_step, jit_train_step, step_config, train_step

T = 16


def make_config(mesh=(1, 1, 1), accumulation=1, **optimizer) -> RunConfig:
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(96, 32, 64, 2, 4, 2, 16),
        data=DataConfig("unused", {"a": SourceConfig(("x",), 1.0), "b": SourceConfig(("y",), 1.0)}, sequence_length=T),
        train=TrainConfig(
            budget_tokens=8 * T * 100, batch_size=8, accumulation_steps=accumulation, compute_dtype="float32"
        ),
        optimizer=OptimizerConfig(learning_rate=0.01, **optimizer),
        mesh=MeshConfig(*mesh),
    )


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 96, (8, T + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": (rng.random((8, T)) < 0.8).astype(np.float32),
        "segment_ids": np.ones((8, T), np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (8, T)).copy(),
        "source": rng.integers(0, 2, 8).astype(np.int32),
    }


def schedule_of(config):
    return make_schedule(config.optimizer, config.total_steps, config.step_tokens)


COMPILED = {}


def compiled(config, mesh):
    """The jitted start and step of a config: tests that share one compile it once."""
    key = repr(config)
    if key not in COMPILED:
        start = jax.jit(
            lambda: init_state(init_params(config.model, 0), config), out_shardings=state_shardings(config, mesh)
        )
        COMPILED[key] = start, jit_train_step(config, mesh)
    return COMPILED[key]


def run(config, batches):
    """(final state, metrics of each step) after training on `batches` on the config's mesh."""
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor])
    check_run(config, mesh)
    with jax.set_mesh(mesh):
        start, step = compiled(config, mesh)
        state, seen = start(), []
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
            seen.append(jax.device_get(metrics))
    return jax.device_get(state), seen


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


@pytest.fixture(scope="module")
def reference():
    return run(make_config(), [make_batch(0), make_batch(1)])


@pytest.mark.parametrize(
    "mesh", [(2, 2, 2), *(pytest.param(m, marks=pytest.mark.slow) for m in ((2, 1, 1), (1, 4, 1), (1, 1, 4)))]
)
def test_sharded_equals_unsharded(reference, mesh):
    state, metrics = run(make_config(mesh), [make_batch(0), make_batch(1)])
    # Adam's first steps divide by a small root: a last-bit difference of a gradient near 0 shows in the parameters.
    assert_close(metrics, reference[1], 1e-4)
    assert_close(state.optimizer[0].mu, reference[0].optimizer[0].mu, 1e-6)


@pytest.mark.parametrize(
    "k, mesh", [(2, (2, 2, 2)), *(pytest.param(k, (1, 1, 1), marks=pytest.mark.slow) for k in (2, 4, 8))]
)
def test_accumulating_k_microbatches_equals_one_batch(reference, k, mesh):
    state, metrics = run(make_config(mesh, accumulation=k), [make_batch(0), make_batch(1)])
    assert_close(metrics, reference[1], 1e-4)
    assert_close(state.optimizer[0].mu, reference[0].optimizer[0].mu, 1e-6)


def test_the_same_step_twice_gives_the_same_bits():
    config = make_config((2, 2, 2), accumulation=2)
    a, b = (run(config, [make_batch(0), make_batch(1)]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_losses_and_counts_are_those_of_each_source(reference):
    batch = make_batch(0)
    metrics = reference[1][0]
    for source in (0, 1):
        rows = batch["source"] == source
        assert metrics["loss_count"][source] == batch["loss_mask"][rows].sum()
    # Fresh parameters predict almost uniformly.
    np.testing.assert_allclose(metrics["loss_sum"] / metrics["loss_count"], np.log(96), rtol=0.02)


def test_evaluation_agrees_with_training_and_ignores_masked_rows():
    config = make_config()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batch = make_batch(0)
    with jax.set_mesh(mesh):
        params = init_params(config.model, 0)
        sums, counts = jit_eval_step(config, mesh)(params, jax.device_put(batch, batch_sharding(mesh)))
        # Another array: a CPU device may read the first one's memory, and may not have done so yet.
        batch["loss_mask"] = np.where(np.arange(8)[:, None] < 4, batch["loss_mask"], 0)
        half, half_counts = jit_eval_step(config, mesh)(params, jax.device_put(batch, batch_sharding(mesh)))
    _, (metrics,) = run(config, [make_batch(0)])
    np.testing.assert_allclose(sums, metrics["loss_sum"], rtol=1e-6)
    assert (
        half_counts.sum() == batch["loss_mask"].sum() and half.sum() < sums.sum() and counts.sum() > half_counts.sum()
    )


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    config = make_config((2, 2, 2))
    bad = make_batch(1) | {"loss_mask": np.full((8, T), np.nan, np.float32)}
    state, metrics = run(config, [make_batch(0), bad, bad])
    before, _ = run(config, [make_batch(0)])
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.optimizer), (before.params, before.optimizer))
    assert int(state.step) == 3 and int(state.skipped) == 2
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 2]
    state, metrics = run(config, [bad, make_batch(0)])
    assert int(metrics[-1]["skipped_in_a_row"]) == 0 and int(state.skipped) == 1


def test_weight_decay_spares_norms_and_by_choice_the_embedding():
    for decay_embedding in (False, True):
        config = make_config(decay_embedding=decay_embedding)
        mask = to_flat(decay_mask(config.optimizer, config.model))
        assert mask["embed_tokens"] is decay_embedding
        assert not any(v for k, v in mask.items() if "norm" in k)
        assert all(v for k, v in mask.items() if "proj" in k)


def test_the_update_is_clipped_adamw(reference):
    """One step by the formulas of optax.adamw with optax's own clipping, from the gradient of the mean loss."""
    config = make_config(clip_norm=0.1)
    state, (metrics,) = run(config, [make_batch(0)])
    start = init_params(config.model, 0)
    assert metrics["gradient_norm"] > 0.1
    unclipped, _ = run(make_config(clip_norm=float("inf")), [make_batch(0)])
    gradient = jax.tree.map(lambda mu: mu / 0.1, unclipped.optimizer[0].mu)  # mu = (1 - 0.9) * gradient
    np.testing.assert_allclose(optax.tree.norm(gradient), metrics["gradient_norm"], rtol=1e-4)
    tx = optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.adamw(
            float(schedule_of(config)(0)), b2=0.95, weight_decay=0.1, mask=decay_mask(config.optimizer, config.model)
        ),
    )
    updates, _ = tx.update(gradient, tx.init(start), start)
    assert_close(state.params, optax.apply_updates(start, updates), 1e-5)
    assert make_optimizer(config.optimizer, config.model).init(start)[0].mu["norm"].dtype == jnp.float32


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_schedule_goes_on_by_tokens_where_the_batch_size_changes(schedule):
    """Twice the size from step 40 of 100 on: 30 steps are left, and the rate at any token is what it was to be."""
    plain = make_config(
        schedule=schedule, warmup=Duration(10, "steps"), decay=Duration(20, "steps"), final_fraction=0.1
    )
    rows, decay = plain.train.batch_size, Duration(10, "steps")
    train = replace(plain.train, batch_size=2 * rows, earlier_batch_sizes=(EarlierBatchSize(40, rows),))
    changed = replace(plain, train=train, optimizer=replace(plain.optimizer, decay=decay))
    assert (plain.total_steps, changed.total_steps) == (100, 70)
    before, after = schedule_of(plain), schedule_of(changed)
    for step in range(71):
        same = step if step <= 40 else 40 + 2 * (step - 40)
        assert changed.step_tokens.at(step) == plain.step_tokens.at(same)
        assert changed.step_tokens.step_of(changed.step_tokens.at(step)) == step
        assert after(step) == pytest.approx(float(before(same)), rel=1e-5)
    # A warm-up in tokens ends with the step that has them, on either side of the change.
    for tokens, steps in ((30, 30), (50, 45)):
        warmup = Duration(tokens * plain.tokens_per_step, "tokens")
        rate = schedule_of(replace(changed, optimizer=replace(changed.optimizer, warmup=warmup)))
        assert rate(steps - 2) < rate(steps - 1) == pytest.approx(changed.optimizer.learning_rate)


def test_schedules_in_steps_and_in_tokens():
    base = make_config(schedule="cosine", warmup=Duration(10, "steps"))
    assert base.total_steps == 100
    rate = schedule_of(base)
    np.testing.assert_allclose(
        [rate(0), rate(9), rate(10), rate(55), rate(100)], [0.001, 0.01, 0.01, 0.0055, 0.001], rtol=1e-5
    )
    tokens = replace(base, optimizer=replace(base.optimizer, warmup=Duration(10 * base.tokens_per_step, "tokens")))
    assert all(schedule_of(tokens)(s) == rate(s) for s in range(100))
    wsd = schedule_of(
        make_config(schedule="wsd", warmup=Duration(10, "steps"), decay=Duration(20, "steps"), final_fraction=0.0)
    )
    np.testing.assert_allclose(
        [wsd(5), wsd(9), wsd(79), wsd(90), wsd(100)], [0.006, 0.01, 0.01, 0.005, 0], rtol=1e-5, atol=1e-9
    )
    none = schedule_of(make_config())
    assert none(0) == np.float32(0.01)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(
        ConfigError, match=r"= 4 rows do not divide over the 8 shards of mesh.data x mesh.fsdp; use a multiple of 16"
    ):
        run(make_config((4, 2, 1), accumulation=2), [])


WINDOW = {"sliding_window": 5, "sliding_window_pattern": 2, "final_logit_softcapping": 0.5}
LOCAL = WINDOW | {"query_pre_attn_scalar": 9}


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "gemma2", "attn_logit_softcapping": 2.0, **LOCAL},
        pytest.param({"model_type": "gemma3_text", "rope_local_base_freq": 100.0, **LOCAL}, marks=pytest.mark.slow),
        pytest.param({"model_type": "llama", "tie_word_embeddings": False}, marks=pytest.mark.slow),
        pytest.param({"model_type": "qwen2", "sliding_window": 5}, marks=pytest.mark.slow),
        pytest.param(
            {"model_type": "gemma4_text", "global_head_dim": 32, "attention_k_eq_v": True, **WINDOW},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_family_has_its_own_loss_on_any_mesh(family):
    """The sharded evaluation step against cross entropy of the model's plain logits, caps and untied head included."""
    config = make_config((2, 2, 2))
    config = replace(config, model=replace(config.model, initializer_range=0.3, **family))
    mesh, batch = make_mesh(config.mesh), make_batch()
    params = jax.jit(lambda: init_params(config.model, 0))()
    # Fresh biases are zeros, which would hide where they lie.
    attention = params.get("layers", {}).get("self_attn", {})
    for i, name in enumerate(sorted(n for n in attention if n.endswith("_bias"))):
        shape = params["layers"]["self_attn"][name].shape
        params["layers"]["self_attn"][name] = jax.random.normal(jax.random.key(i), shape)
    gemma = nnx.merge(model_graph(config.model), params)
    rows = (jnp.asarray(batch[k]) for k in ("tokens", "positions", "segment_ids"))
    hidden = gemma(*rows, ForwardOptions(jnp.float32))
    scores = np.asarray(hidden @ (params["lm_head"] if "lm_head" in params else params["embed_tokens"]).T, np.float64)
    cap = config.model.final_logit_softcapping
    scores = cap * np.tanh(scores / cap) if cap else scores
    chosen = np.take_along_axis(scores, batch["targets"][..., None], -1)[..., 0]
    entropy = (np.log(np.exp(scores).sum(-1)) - chosen) * batch["loss_mask"]
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, state_shardings(config, mesh).params)
        sums, _ = jit_eval_step(config, mesh)(sharded, jax.device_put(batch, batch_sharding(mesh)))
    expected = [entropy[batch["source"] == s].sum() for s in (0, 1)]
    np.testing.assert_allclose(sums, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_the_scalar_of_a_layer_is_trained_only_where_that_is_asked_for(trained):
    config = make_config(weight_decay=0.5)
    model = replace(config.model, model_type="gemma4_text", global_head_dim=32, attention_k_eq_v=True, **WINDOW)
    config = replace(config, model=model, train=replace(config.train, layer_scalars=trained))
    before = to_flat(init_params(config.model, 0))
    after = to_flat(run(config, [make_batch(0)])[0].params)
    for path, value in before.items():
        assert (not np.array_equal(after[path], value)) == (trained or not path.endswith("scalar")), path


def test_a_fresh_state_is_typed_as_a_restored_one():
    """Else the step is compiled once for the first state and again for the second."""
    params = jax.eval_shape(lambda: init_params(make_config().model, 0))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_gradients_summed_in_float32_are_nearer_to_those_of_one_device():
    """In bfloat16 every device rounds its part."""

    def gradients(mesh, wide):
        config = make_config(mesh)
        narrow = replace(config.train, compute_dtype="bfloat16", float32_reduction=wide)
        return to_flat(run(replace(config, train=narrow), [make_batch(0)])[0].optimizer[0].mu)

    one, many, rounded = gradients((1, 1, 1), True), gradients((1, 8, 1), True), gradients((1, 8, 1), False)
    for name in (name for name in one if "proj" in name):
        near, far = (np.linalg.norm(x[name] - one[name]) / np.linalg.norm(one[name]) for x in (many, rounded))
        assert near < 0.6 * far, name  # what is left are activations that round the other way in another product


def products(jaxpr):
    """(dtypes of the operands, precision) of every product of a program, those of its loops and kernels included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(str(v.aval.dtype) for v in eqn.invars), eqn.params["precision"]
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("attention", ["splash", "xla"])
def test_products_of_float32_are_exact_on_a_tpu(attention):
    """A TPU rounds float32 operands to bfloat16 unless a product asks for more."""
    config = make_config((1, 2, 2))
    model = replace(config.model, head_dim=128, max_position_embeddings=256)
    config = replace(config, model=model, data=replace(config.data, sequence_length=128))
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    c = step_config(config, mesh)
    if attention == "splash":
        c = replace(c, attention=partial(splash_attention, block=128))
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        trained = jax.jit(partial(train_step, c=c)).trace(state, batch)
        evaluated = jax.jit(partial(eval_step, c=c)).trace(state.params, batch)
    for program, least in ((trained, 24), (evaluated, 10)):
        seen = list(products(program.jaxpr.jaxpr))
        assert len(seen) >= least
        assert set(seen) == {(("float32", "float32"), (jax.lax.Precision.HIGHEST,) * 2)}
        lowered = program.lower(lowering_platforms=("tpu",)).as_text()  # kernels are bytes here
        lines = [line for line in lowered.splitlines() if "dot_general" in line]
        assert len(lines) >= 8 and all("precision = [HIGHEST, HIGHEST]" in line for line in lines)


@pytest.mark.parametrize(
    "width, capability, message",
    [
        (128, "8.0", None),
        (256, "9.0", None),
        (256, "10.0", None),
        (
            256,
            "8.9",
            "at most 128 wide at compute capability 8.9; here are gpu devices, .* heads 256 wide; use auto or xla",
        ),
        (20, "9.0", "a multiple of 8"),
    ],
)
def test_heads_that_cudnn_cannot_take_are_refused(width, capability, message):
    config = make_config()
    train = replace(config.train, compute_dtype="bfloat16", attention="cudnn")
    config = replace(config, model=replace(config.model, head_dim=width), train=train)
    device = Mock(platform="gpu", compute_capability=capability)
    mesh = Mock(spec=jax.sharding.Mesh, devices=np.array([device]))
    if message is None:
        assert attention_on(config, mesh) is cudnn_attention
        return
    with pytest.raises(ConfigError, match=message):
        attention_on(config, mesh)
