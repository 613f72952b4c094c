"""Layers of several kinds: the runs that a scan covers, and that the scans compute what the layers one by one do."""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easylm_mling.config import ModelConfig, RopeScaling
from easylm_mling.inference import generate as generation
from easylm_mling.model.attention import attention
from easylm_mling.model.decoder import ForwardOptions
from easylm_mling.model.layer import rms_norm
from easylm_mling.model.layer_kinds import layer_kinds, runs, stacks
from easylm_mling.model.remat import Remat
from easylm_mling.model.splash_attention import splash_attention
from easylm_mling.training.state import init_params, model_graph

GEMMA_3 = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    model_type="gemma3_text",
    sliding_window=3,
    sliding_window_pattern=2,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    rope_scaling=RopeScaling("linear", 8.0),
)
GEMMA_4 = replace(
    GEMMA_3,
    model_type="gemma4_text",
    global_head_dim=32,
    rope_scaling=RopeScaling("proportional", 1.0, partial_rotary_factor=0.25),
    num_hidden_layers=4,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=8,
)
B, T = 2, 16
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 96, (B, T), dtype=np.int32))
BY_HIDDEN = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, 32)), jnp.float32)
POSITIONS = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))


def letters(m: ModelConfig, begin: int = 0) -> list[tuple[str, int]]:
    """Each run as its period, L for a local layer and G for a global one, and its count."""
    return [("".join("L" if k.local else "G" for k in run.kinds), run.count) for run in runs(layer_kinds(m)[begin:])]


@pytest.mark.parametrize(
    "layers, pattern, begin, expected",
    [
        (26, 6, 0, [("LLLLLG", 4), ("L", 2)]),  # Gemma 3 1B
        (34, 6, 0, [("LLLLLG", 5), ("L", 4)]),  # 4B
        (48, 6, 0, [("LLLLLG", 8)]),  # 12B
        (62, 6, 0, [("LLLLLG", 10), ("L", 2)]),  # 27B
        (42, 2, 0, [("LG", 21)]),  # Gemma 2 9B
        (48, 6, 12, [("LLLLLG", 6)]),
        # Behind layers of another remat policy a period may begin anywhere.
        (48, 6, 7, [("LLLLGL", 6), ("LLLLG", 1)]),
        (4, 6, 0, [("L", 4)]),
    ],
)
def test_runs_are_whole_periods_and_what_is_left(layers, pattern, begin, expected):
    m = replace(GEMMA_3, num_hidden_layers=layers, sliding_window_pattern=pattern)
    assert letters(m, begin) == expected
    assert stacks(m) == {"layers": tuple(range(layers))}


@pytest.mark.parametrize(
    "layers, pattern, shared, expected",
    [
        (35, 5, 20, [("LLLLG", 3), ("LLLLG", 4)]),  # Gemma 4 E2B
        (42, 6, 18, [("LLLLLG", 4), ("LLLLLG", 3)]),  # E4B
        (48, 6, 0, [("LLLLLG", 8)]),  # 12B
    ],
)
def test_layers_that_share_keys_and_values_are_runs_and_stacks_of_their_own(layers, pattern, shared, expected):
    m = replace(GEMMA_4, num_hidden_layers=layers, sliding_window_pattern=pattern, num_kv_shared_layers=shared)
    assert letters(m) == expected
    found = runs(layer_kinds(m))
    assert [run.shares for run in found] == [False, True][: len(expected)]
    own = range(layers - shared)
    by_stack = {
        "local_layers": [i for i in own if (i + 1) % pattern],
        "global_layers": [i for i in own if not (i + 1) % pattern],
    }
    later = range(layers - shared, layers)
    by_stack |= {
        f"shared_{name}": [i for i in later if bool((i + 1) % pattern) == (name[0] == "l")] for name in by_stack
    }
    assert {stack: [*numbers] for stack, numbers in stacks(m).items()} == {k: v for k, v in by_stack.items() if v}
    for kind in layer_kinds(m):
        assert kind.mlp_width == (128 if kind.shares else 64) and kind.head_dim == (16 if kind.local else 32)


@pytest.mark.slow
@pytest.mark.parametrize("layers, pattern, shared", [(6, 2, 2), (9, 3, 3)])
def test_a_change_of_shared_keys_reaches_every_layer_that_shares_them(layers, pattern, shared):
    """The gradient of the loss by k and v of each layer that has them: as by a plain loop over transformers' rule."""
    m = replace(GEMMA_4, num_hidden_layers=layers, sliding_window_pattern=pattern, num_kv_shared_layers=shared)
    params = jax.tree.map(lambda a: 5 * a if a.ndim > 2 else a, init_params(m, 0))

    def plain(params):
        model, shown = nnx.merge(model_graph(m), params), {}
        x = params["embed_tokens"][TOKENS] * 32**0.5
        inputs, places = model.per_layer(TOKENS, x), Counter()
        for i, local in enumerate(m.local_layers):
            stack = ("shared_" if i >= layers - shared else "") + ("local" if local else "global") + "_layers"
            layer = jax.tree.map(lambda a: a[places[stack]], getattr(model, stack))  # noqa: B023
            places[stack] += 1
            whole = 1e4 ** (-np.arange(8) / 8) if local else 1e6 ** (-np.arange(16) / 16) * (np.arange(16) < 4)

            def attend(q, k, v, local=local):
                window = m.sliding_window if local else None
                return attention(q, k, v, jnp.ones((B, T), jnp.int32), window, None), None, (k, v)

            given = shown[local] if i >= layers - shared else None
            x, _, shown[local] = layer(x, POSITIONS, jnp.asarray(whole, jnp.float32), attend, given, inputs[i])
        return jnp.sum(BY_HIDDEN * rms_norm(x, params["norm"], m.rms_norm_eps, 0.0))

    expected, gradient = jax.jit(jax.value_and_grad(plain))(params)
    got, by = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))(params, m, Remat("save_out", "full", 1))
    # A sum of terms of either sign: its error is that of its terms.
    np.testing.assert_allclose(got, expected, atol=float(np.finfo(np.float32).eps * np.abs(BY_HIDDEN).sum()))
    assert_close(by, gradient)


def test_layers_of_one_kind_are_one_run():
    for window in (None, 3):
        m = ModelConfig(96, 32, 64, 28, 4, 2, 16, model_type="mistral", sliding_window=window)
        (run,) = runs(layer_kinds(m))
        assert len(run.kinds) == 1 and run.count == 28 and run.kinds[0].window == window


def loss(params, m, remat):
    """A loss of which no part is constant, as the squares of normed vectors would be."""
    model, segments = nnx.merge(model_graph(m), params), jnp.ones((B, T), jnp.int32)
    return jnp.sum(BY_HIDDEN * model(TOKENS, POSITIONS, segments, ForwardOptions(jnp.float32, remat)))


def one_by_one(params, m):
    """The same by a plain loop over layers, with the windows and frequencies that the config means."""
    model = nnx.merge(model_graph(m), params)
    x = params["embed_tokens"][TOKENS] * 32**0.5
    for i in range(m.num_hidden_layers):
        far = (i + 1) % m.sliding_window_pattern == 0
        frequencies = 1e6 ** (-np.arange(8) / 8) / 8.0 if far else 1e4 ** (-np.arange(8) / 8)
        window = None if far else m.sliding_window
        layer = jax.tree.map(lambda a: a[i], model.layers)  # noqa: B023

        def attend(q, k, v, window=window):
            return attention(q, k, v, jnp.ones((B, T), jnp.int32), window, None), None, (k, v)

        x, *_ = layer(x, jnp.asarray(POSITIONS), jnp.asarray(frequencies, jnp.float32), attend)
    return jnp.sum(BY_HIDDEN * rms_norm(x, params["norm"], m.rms_norm_eps))


def assert_close(gradient, expected):
    """Each parameter's to four digits; but what is nothing beside the others, as a scale before a norm, is rounding."""
    pairs = [*zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True)]
    largest = max(np.linalg.norm(b) for _, b in pairs)
    for a, b in pairs:
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-7 * largest, a.shape


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: 5 * a if a.ndim > 2 else a, init_params(GEMMA_3, 0))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [2, 4])
def test_scans_over_periods_are_the_layers_one_by_one(params, pattern):
    m = replace(GEMMA_3, sliding_window_pattern=pattern)
    expected, gradient = jax.jit(jax.value_and_grad(one_by_one), static_argnums=1)(params, m)
    # Whole periods and a rest; and a policy of its own for a layer that is no whole period.
    for remat in (Remat("full"), Remat("save_qkv", "save_dots", 1)):
        got, by = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))(params, m, remat)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert_close(by, gradient)


def primitives(jaxpr) -> Counter:
    """How often each primitive stands in a program, its inner programs but those of kernels included.

    A choice by platform is none in what is compiled, and has a name of its own.
    """
    count: Counter = Counter()
    for equation in jaxpr.eqns:
        by_platform = equation.params.get("branches_platforms")
        count["by platform" if by_platform else equation.primitive.name] += 1
        inside = equation.params.values() if equation.primitive.name != "pallas_call" else ()
        for value in inside:
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    count += primitives(getattr(inner, "jaxpr", inner))
    return count


def test_no_layer_carries_the_kernel_of_another_kind():
    """Gemma 2: one kernel for a period's local layer and one for its global layer, and nothing that chooses."""
    m = ModelConfig(96, 32, 64, 6, 1, 1, 128, model_type="gemma2", sliding_window=128, sliding_window_pattern=2)
    options = ForwardOptions(jnp.float32, Remat("full"), partial(splash_attention, block=128))
    wide = jnp.zeros((1, 256), jnp.int32)

    def forward(params):
        return nnx.merge(model_graph(m), params)(wide, wide, wide, options)

    count = primitives(jax.make_jaxpr(forward)(jax.eval_shape(lambda: init_params(m, 0))).jaxpr)
    assert count["pallas_call"] == 2 and count["cond"] == 0 and count["scan"] == 1
    assert count["by platform"] == 4  # the order of queries and keys


def test_layers_of_a_kind_are_compiled_once():
    """Gemma 3: five local layers and a global one are two kernels, but where layers save values, or have caches."""
    m = replace(GEMMA_3, num_hidden_layers=12, sliding_window_pattern=6)
    seen: list[int | None] = []

    def attend(q, k, v, window, cache):
        seen.append(window)
        return attention(q, k, v, jnp.ones((B, T), jnp.int32), window, None), (k, v), (k, v)

    def run(params, caches, policy):
        options = ForwardOptions(jnp.float32, Remat(policy))
        return nnx.merge(model_graph(m), params).run(TOKENS, POSITIONS, attend, caches, options)

    params = jax.eval_shape(lambda: init_params(m, 0))
    hidden, caches = jax.eval_shape(lambda p: run(p, None, "full"), params)
    assert set(seen) == {3, None} and len(seen) == 2
    assert [x.shape for x in caches[0][0]] == [(2, B, T, 2, 16)] * 2 and len(caches[0]) == 6
    for given, policy in ((caches, "full"), (None, "save_qkv")):
        seen.clear()
        assert jax.eval_shape(lambda p, c, policy=policy: run(p, c, policy), params, given) == (hidden, caches)
        assert seen == [3] * 5 + [None]


def test_local_layers_keep_their_window_only(params):
    model = nnx.merge(model_graph(GEMMA_3), params)
    lengths = jnp.asarray([16, 5])
    _, caches = jax.eval_shape(lambda: generation.prefill(model, TOKENS, lengths, 8, jnp.float32))
    shapes = [[[x.shape for x in cache] for cache in scan] for scan in caches]
    local, whole = (3, 2, 16), (24, 2, 16)
    assert shapes == [[[(2, B, *s)] * 2 for s in (local, whole)], [[(1, B, *local)] * 2]]


def test_a_slot_holds_the_newest_of_its_positions():
    x = jnp.arange(2 * 9.0).reshape(2, 9, 1, 1)
    slots = generation._in_slots(x, jnp.asarray([9, 2]), 4)[..., 0, 0]
    assert slots[0].tolist() == [8, 5, 6, 7] and slots[1, :2].tolist() == [9, 10]
    held = generation._held(jnp.asarray([8, 1]), 4)
    assert held[0].tolist() == [8, 5, 6, 7] and held[1].tolist() == [0, 1, -2, -1]
