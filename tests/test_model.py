"""Properties of the model, the loss and the sharding of both. Parity with transformers is in test_hf_parity.py."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError

from easylm_mling.config import REMAT_NAMES, MeshConfig, ModelConfig, OptimizerConfig, RopeScaling
from easylm_mling.data.mixture import row_arrays
from easylm_mling.errors import ConfigError
from easylm_mling.model.attention import attention, cudnn_attention
from easylm_mling.model.decoder import ForwardOptions, logits
from easylm_mling.model.embedding import lookup
from easylm_mling.model.gated_mlp import activated, gated_down
from easylm_mling.model.layer import _heads_first, rms_norm
from easylm_mling.model.params import parameter_table, to_flat, to_nested
from easylm_mling.model.projection import project
from easylm_mling.model.remat import REMAT_POLICIES, Remat
from easylm_mling.model.rotary import rotary, rotary_frequencies
from easylm_mling.model.sharding import fits_tiles, make_mesh, parameter_shardings, partition_spec
from easylm_mling.model.splash_attention import splash_attention
from easylm_mling.training.loss import cross_entropy
from easylm_mling.training.optimizer import decay_mask
from easylm_mling.training.state import init_params, model_graph

M = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
GEMMA_2B = ModelConfig(256000, 2048, 16384, 18, 8, 1, 256)
GEMMA_7B = ModelConfig(256000, 3072, 24576, 28, 16, 16, 256)


GEMMA_4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "sliding_window": 3,
    "sliding_window_pattern": 2,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": RopeScaling("proportional", 1.0, partial_rotary_factor=0.25),
}
SMALL = {
    "num_hidden_layers": 6,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
}
LOCAL = {"num_hidden_layers": 4, "sliding_window": 3, "sliding_window_pattern": 2, "query_pre_attn_scalar": 9}
FAMILIES = {
    "gemma": M,
    "gemma2": replace(M, model_type="gemma2", **LOCAL, attn_logit_softcapping=2.0, final_logit_softcapping=1.0),
    "gemma3_text": replace(M, model_type="gemma3_text", **LOCAL, rope_theta=1e6, rope_local_base_freq=1e4),
    "gemma4_text": replace(M, **GEMMA_4),
    "gemma4_small": replace(M, **GEMMA_4 | SMALL),
    "llama": replace(M, model_type="llama", tie_word_embeddings=False),
    "mistral": replace(M, model_type="mistral", sliding_window=3),
    "qwen2": replace(M, model_type="qwen2"),
    "qwen3": replace(M, model_type="qwen3", tie_word_embeddings=False),
}
FEW = ("gemma", "gemma3_text", "gemma4_text", "llama")  # whose tests take long, and the other families' are slow
ONES = (
    "gemma4_text",
    "gemma4_small",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # families whose norms multiply by their weights alone


@pytest.fixture(scope="module")
def params():
    return init_params(M, 0)


def hidden(params, tokens, positions=None, segment_ids=None, dtype=jnp.float32, remat="full", m=M, **more):
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions
    segment_ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    options = ForwardOptions(dtype, Remat(remat), **more)
    return nnx.merge(model_graph(m), params)(tokens, positions, segment_ids, options)


def random_tokens(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, M.vocab_size, shape, dtype=np.int32))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_the_model(family):
    m = FAMILIES[family]
    params = init_params(m, 0)
    assert {k: v.shape for k, v in to_flat(params).items()} == {p.path: p.shape for p in parameter_table(m)}
    assert to_flat(to_nested(to_flat(params))).keys() == to_flat(params).keys()
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(params))
    norms = {p.path for p in parameter_table(m) if p.kind == "norm"}
    counts = {"gemma": 3, "gemma2": 5, "gemma3_text": 7, "llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 5}
    counts |= {"gemma4_text": 2 * 6 + 1, "gemma4_small": 2 * 7 + 2 * 6 + 2}
    assert len(norms) == counts[family]
    biases = {p.path for p in parameter_table(m) if p.kind == "bias"}
    assert len(biases) == (3 if family == "qwen2" else 0)
    for path, value in to_flat(params).items():
        constant = 0.0 if path in biases else float(family in ONES)
        scalar = path.endswith("layer_scalar")
        assert (np.unique(value).tolist() == [constant]) == (path in norms | biases or scalar), path


@pytest.mark.parametrize("family", ["qwen2", "gemma4_text"])
def test_biases_norms_and_scalars_are_not_decayed(family):
    m = FAMILIES[family]
    mask = to_flat(decay_mask(OptimizerConfig(decay_embedding=True), m))
    assert {path for path, decayed in mask.items() if not decayed} == {
        p.path for p in parameter_table(m) if p.path.endswith(("norm", "bias", "scalar"))
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_each_hugging_face_tensor_is_named_once_and_has_as_many_elements(family):
    table = parameter_table(FAMILIES[family])
    names = [name for p in table for name in p.hf_names]
    assert len(names) == len(set(names)) and len({p.path for p in table}) == len(table)
    for p in table:
        assert np.prod(p.hf_shape) == np.prod(p.shape[1:] if p.stacked else p.shape), p.path
        assert len(p.layers) == p.shape[0] if p.stacked else not p.layers


def test_a_later_token_changes_nothing_before_it(params):
    tokens = random_tokens((1, 12))
    before = hidden(params, tokens)
    after = hidden(params, tokens.at[0, 7].set((tokens[0, 7] + 1) % M.vocab_size))
    changed = np.any(np.asarray(before != after)[0], axis=-1)
    assert not changed[:7].any() and changed[7:].all()


def test_a_local_layer_sees_its_window_and_no_further():
    """One local layer of window 3: a token changes itself and the two after it. With global layers: all after it."""
    m = replace(FAMILIES["gemma3_text"], num_hidden_layers=2, sliding_window_pattern=5)
    tokens = random_tokens((1, 12))
    other = tokens.at[0, 4].set((tokens[0, 4] + 1) % M.vocab_size)
    for layers, pattern, reached in ((1, 5, range(4, 7)), (2, 5, range(4, 9)), (2, 2, range(4, 12))):
        m = replace(m, num_hidden_layers=layers, sliding_window_pattern=pattern)
        params = init_params(m, 0)
        changed = np.any(np.asarray(hidden(params, tokens, m=m) != hidden(params, other, m=m))[0], axis=-1)
        assert np.flatnonzero(changed).tolist() == list(reached), (layers, pattern)


def test_a_window_without_a_pattern_is_every_layers():
    """Each of two layers of window 3 reaches two further; without a window all that follows changes."""
    tokens = random_tokens((1, 12))
    other = tokens.at[0, 4].set((tokens[0, 4] + 1) % M.vocab_size)
    for window, reached in ((3, range(4, 9)), (None, range(4, 12))):
        m = replace(FAMILIES["mistral"], num_hidden_layers=2, sliding_window=window)
        params = init_params(m, 0)
        changed = np.any(np.asarray(hidden(params, tokens, m=m) != hidden(params, other, m=m))[0], axis=-1)
        assert np.flatnonzero(changed).tolist() == list(reached), window


@pytest.mark.parametrize("family", [f if f in FEW else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_packed_documents_do_not_see_each_other(family):
    """Two documents in one row give the hidden states that each has alone, whatever the other says."""
    m = FAMILIES[family]
    params, run = init_params(m, 0), partial(hidden, m=m)
    a, b = random_tokens((1, 5), 1), random_tokens((1, 7), 2)
    tokens = jnp.concatenate([a, b], axis=1)
    positions = jnp.asarray([[*range(5), *range(7)]])
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    packed = run(params, tokens, positions, segments)
    np.testing.assert_allclose(packed[:, :5], run(params, a), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], run(params, b), atol=1e-5)
    other = run(params, tokens.at[0, 2].set(5), positions, segments)
    np.testing.assert_array_equal(packed[:, 5:], other[:, 5:])


def test_packed_loss_is_the_sum_of_each_document_alone(params):
    """The mixer's arrays of a row of three documents, against each document as a row of its own."""
    rng = np.random.default_rng(0)
    documents = [np.array([2, *rng.integers(4, M.vocab_size, n), 1], np.int32) for n in (3, 9, 1)]

    def loss(stream):
        row = row_arrays(np.append(stream, np.int32(2))[None], bos_id=2)
        on_device = {k: jnp.asarray(v) for k, v in row.items()}
        h = hidden(params, *(on_device[k] for k in ("tokens", "positions", "segment_ids")))
        _, entropy, _ = cross_entropy(h, params["embed_tokens"], on_device["targets"], on_device["loss_mask"], 5)
        return float(entropy[0]), row["loss_mask"].sum()

    alone = [loss(d) for d in documents]
    packed, targets = loss(np.concatenate(documents))
    np.testing.assert_allclose(packed, sum(entropy for entropy, _ in alone), rtol=1e-6)
    assert targets == sum(n for _, n in alone) == sum(len(d) - 1 for d in documents)


@pytest.mark.parametrize("window, soft_cap", [(None, None), (1, None), (100, None), (None, 0.7), (600, 0.7)])
def test_chunked_attention_is_attention(window, soft_cap):
    keys = jax.random.split(jax.random.key(0), 4)
    B, T, N, K, H = 2, 1024, 2, 1, 8
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K), strict=False))
    segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.01, (B, T)), axis=1).astype(jnp.int32) + 1

    def plain(q, k, v):
        back = np.arange(T)[:, None] - np.arange(T)
        seen = (back >= 0) & (back < (window or T))
        mask = (segments[:, :, None] == segments[:, None, :]) & seen
        scores = jnp.einsum("btnh,bskh->bnts", q, k)
        scores = soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores
        return jnp.einsum("bnts,bskh->btnh", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30)), v)

    def chunked(q, k, v):
        return attention(q, k, v, segments, window, soft_cap)

    def summed(f):
        return lambda *x: jnp.sum(jnp.sin(f(*x)))

    np.testing.assert_allclose(chunked(q, k, v), plain(q, k, v), atol=2e-6)
    got = jax.grad(summed(chunked), (0, 1, 2))(q, k, v)
    for a, b in zip(got, jax.grad(summed(plain), (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_tests_refuse_a_wrong_shape_or_dtype_at_the_boundary():
    q, kv, segments = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 1, 8)), jnp.ones((1, 4), jnp.int32)
    attention(q, kv, kv, segments, None, None)
    for wrong in ((q[:, :3], kv, kv, segments), (q, kv[..., :4], kv, segments), (q, kv, kv, segments.astype(float))):
        with pytest.raises(TypeCheckError, match="attention"):
            attention(*wrong, None, None)


def test_norms_rotary_and_embedding_scale_round_where_gemma_rounds():
    x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16) * 3
    w = jax.random.normal(jax.random.key(1), (64,)) * 0.1
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6) * (1 + np.asarray(w, np.float64))
    # Rounded once, at the end: never further than half a unit in the last place of bfloat16.
    np.testing.assert_allclose(np.asarray(rms_norm(x, w, 1e-6), np.float64), exact, rtol=2**-8)

    far = jnp.full((1, 1), 8191)
    q = jnp.ones((1, 1, 1, 16), jnp.bfloat16)
    angles = 8191 * 10000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(
        np.asarray(rotary(q, far, rotary_frequencies(10000.0, 16)), np.float64)[0, 0, 0, :8],
        np.cos(angles) - np.sin(angles),
        atol=0.01,
    )
    assert jnp.asarray(3072**0.5, jnp.bfloat16) == 55.5


def test_the_gradient_of_rotary_is_rounded_once():
    frequencies, positions = rotary_frequencies(10000.0, 16), jnp.arange(8191)[None]
    x, grad = jax.random.normal(jax.random.key(0), (2, 1, 8191, 1, 16), jnp.bfloat16)
    _, transpose = jax.vjp(lambda x: rotary(x, positions, frequencies, scale=0.3), x)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin, (a, b) = jnp.cos(angles), jnp.sin(angles), jnp.split(grad.astype(jnp.float32), 2, axis=-1)
    exact = 0.3 * jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
    # Half a unit in the last place, and what float32 loses where two terms cancel.
    np.testing.assert_allclose(transpose(grad)[0].astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_every_remat_policy_computes_the_same_gradient(params):
    assert REMAT_POLICIES.keys() == set(REMAT_NAMES)
    tokens = random_tokens((2, 16))

    def loss(params, remat):
        return jnp.sum(jnp.square(hidden(params, tokens, remat=remat)))

    gradient = jax.jit(jax.grad(loss), static_argnames="remat")
    reference = gradient(params, remat="none")
    for name in REMAT_NAMES:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient(params, remat=name), reference)


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a program makes, its loops' bodies included."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(int(np.prod(v.aval.shape)) for v in equation.outvars)])
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    largest = max(largest, largest_array(getattr(inner, "jaxpr", inner)))
    return largest


@pytest.mark.parametrize("chunk, cap", [(5, None), (16, None), (64, None), (16, 0.5)])
def test_chunked_loss_is_the_plain_loss_and_never_holds_all_logits(chunk, cap):
    B, T, D, V = 2, 40, 8, 300
    h, e = jax.random.normal(jax.random.key(0), (B, T, D)), jax.random.normal(jax.random.key(1), (V, D))
    targets = jax.random.randint(jax.random.key(2), (B, T), 0, V)
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (B, T)).astype(jnp.float32)

    def plain(h, e):
        scores = logits(h, e, None)
        scores = cap * jnp.tanh(scores / cap) if cap else scores
        normaliser = jax.nn.logsumexp(scores, -1)
        entropy = normaliser - jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
        return 3.0 * jnp.sum((entropy + 0.01 * normaliser**2) * mask)

    def chunked(h, e):
        return 3.0 * cross_entropy(h, e, targets, mask, chunk, 0.01, cap)[0]

    np.testing.assert_allclose(chunked(h, e), plain(h, e), rtol=1e-6)
    for a, b in zip(jax.grad(chunked, (0, 1))(h, e), jax.grad(plain, (0, 1))(h, e), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert largest_array(jax.make_jaxpr(jax.grad(plain))(h, e).jaxpr) == B * T * V
    if chunk < T:
        assert largest_array(jax.make_jaxpr(jax.grad(chunked))(h, e).jaxpr) < B * T * V


def test_the_loss_of_a_gemma_s_vocabulary_is_the_plain_loss_to_the_last_digits():
    B, T, D, V = 1, 24, 16, 256_000
    h, e = jax.random.normal(jax.random.key(0), (B, T, D)), 0.1 * jax.random.normal(jax.random.key(1), (V, D))
    targets = jax.random.randint(jax.random.key(2), (B, T), 0, V)
    mask = jnp.ones((B, T))

    def plain(h, e):
        scores = jnp.einsum("btd,vd->btv", h, e)
        return jnp.sum(jax.nn.logsumexp(scores, -1) - jnp.take_along_axis(scores, targets[..., None], -1)[..., 0])

    loss, gradients = jax.value_and_grad(lambda *x: cross_entropy(*x, targets, mask, 8)[0], (0, 1))(h, e)
    wanted, plain_gradients = jax.value_and_grad(plain, (0, 1))(h, e)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    for a, b in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


GOLDEN = {
    # Gemma 7B on 2 x 2 x 2: every parameter cut along embed and along one other axis.
    ("7b", (2, 2, 2)): {
        "embed_tokens": ("tensor", "fsdp"),
        "layers.input_layernorm": (None, "fsdp"),
        "layers.self_attn.q_proj": (None, "tensor", None, "fsdp"),
        "layers.self_attn.k_proj": (None, "tensor", None, "fsdp"),
        "layers.self_attn.v_proj": (None, "tensor", None, "fsdp"),
        "layers.self_attn.o_proj": (None, "fsdp", "tensor", None),
        "layers.post_attention_layernorm": (None, "fsdp"),
        "layers.mlp.gate_proj": (None, "tensor", "fsdp"),
        "layers.mlp.up_proj": (None, "tensor", "fsdp"),
        "layers.mlp.down_proj": (None, "fsdp", "tensor"),
        "norm": ("fsdp",),
    },
    # Gemma 4: local and global layers have stacks of their own, and the one key/value head of global ones lies whole.
    ("4", (1, 4, 2)): {
        "embed_tokens": ("tensor", "fsdp"),
        **{
            f"{stack}.{name}": spec
            for stack, few in (("local_layers", "tensor"), ("global_layers", None))
            for name, spec in {
                "input_layernorm": (None, "fsdp"),
                "self_attn.q_proj": (None, "tensor", None, "fsdp"),
                "self_attn.k_proj": (None, few, None, "fsdp"),
                **({"self_attn.v_proj": (None, few, None, "fsdp")} if few else {}),
                "self_attn.o_proj": (None, "fsdp", "tensor", None),
                "post_attention_layernorm": (None, "fsdp"),
                "mlp.gate_proj": (None, "tensor", "fsdp"),
                "mlp.up_proj": (None, "tensor", "fsdp"),
                "mlp.down_proj": (None, "fsdp", "tensor"),
                "pre_feedforward_layernorm": (None, "fsdp"),
                "post_feedforward_layernorm": (None, "fsdp"),
                "self_attn.q_norm": (None, None),
                "self_attn.k_norm": (None, None),
                "layer_scalar": (None, None),
            }.items()
        },
        "norm": ("fsdp",),
    },
    # Gemma 2B has one key/value head: every tensor shard keeps it.
    ("2b", (1, 2, 4)): {
        "embed_tokens": ("tensor", "fsdp"),
        "layers.input_layernorm": (None, "fsdp"),
        "layers.self_attn.q_proj": (None, "tensor", None, "fsdp"),
        "layers.self_attn.k_proj": (None, None, None, "fsdp"),
        "layers.self_attn.v_proj": (None, None, None, "fsdp"),
        "layers.self_attn.o_proj": (None, "fsdp", "tensor", None),
        "layers.post_attention_layernorm": (None, "fsdp"),
        "layers.mlp.gate_proj": (None, "tensor", "fsdp"),
        "layers.mlp.up_proj": (None, "tensor", "fsdp"),
        "layers.mlp.down_proj": (None, "fsdp", "tensor"),
        "norm": ("fsdp",),
    },
}


@pytest.mark.parametrize("model, sizes", GOLDEN)
def test_golden_sharding(model, sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    shardings = parameter_shardings({"2b": GEMMA_2B, "7b": GEMMA_7B, "4": FAMILIES["gemma4_text"]}[model], mesh)
    assert {k: tuple(v.spec) for k, v in to_flat(shardings).items()} == GOLDEN[model, sizes]


# Widths of configs/model whose parts, over so many devices along fsdp, are no whole tiles, or columns of one.
IN_ROWS = {
    1: set(),
    4: {1536, 2560, 3584, 4608},
    8: {1024, 3072, 5120},
    16: {640, 896, 1152, 2048},
    32: {640, 896, 1152, 2304, 3840, 4096, 5376},
    64: {640, 896, 1152, 1536, 2304, 2560, 3584, 3840, 4608, 5376, 8192},
}


def test_golden_widths_whose_gradients_are_made_in_rows():
    files = (Path(__file__).parent.parent / "configs" / "model").glob("*.yaml")
    widths = {int(re.findall(r"hidden_size: (\d+)", file.read_text())[0]) for file in files}

    def in_rows(data: int, shards: int) -> set[int]:
        with jax.sharding.use_abstract_mesh(abstract_mesh(data, shards)):
            return {width for width in widths if width % shards == 0 and not all(fits_tiles(width))}

    assert {shards: in_rows(2, shards) for shards in IN_ROWS} == IN_ROWS
    # Over all devices sums are made in two steps, and the first has half as many parts.
    assert {shards: in_rows(1, 2 * shards) for shards in IN_ROWS if shards > 1} == {
        shards: {width for width in found if width % (2 * shards) == 0}
        for shards, found in IN_ROWS.items()
        if shards > 1
    }
    assert all(all(fits_tiles(width)) for width in widths)  # without a mesh


def abstract_mesh(data: int, shards: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((data, shards, 1), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    "width, form", [(96, None), (120, "matrix"), (128, "rows"), (256, None), (168, "matrix"), (384, "rows")]
)
@pytest.mark.parametrize(
    "spec, kernel", [("btd,nhd->btnh", (2, 8, 0)), ("btnh,dnh->btd", (0, 2, 8)), ("btd,fd->btf", (24, 0))]
)
def test_gradients_whose_parts_are_no_whole_tiles_are_made_in_rows(width, form, spec, kernel):
    """The width is the first axis; where it fills no whole rows of tiles, heads are one axis with head_dim."""
    D, shards = width * 32, 32
    shape = tuple(n or D for n in kernel)
    size = {**dict(zip(spec.split("->")[0].split(",")[1], shape, strict=True)), "b": 1, "t": 4}
    of_x, out = spec.split(",")[0], spec.split("->")[1]
    x, w, by = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ([size[c] for c in of_x], shape, [size[c] for c in out]))
    with jax.sharding.use_abstract_mesh(abstract_mesh(2, shards)):
        jaxpr = jax.make_jaxpr(lambda x, w, by: jax.vjp(partial(project, spec), x, w)[1](by))(x, w, by)
    (_, gradient) = jaxpr.out_avals
    assert gradient.shape == shape and gradient.dtype == jnp.bfloat16
    barriers = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]
    rest = tuple(n for n in kernel if n)
    assert barriers == {None: [], "rows": [(D, *rest)], "matrix": [(D, math.prod(rest))]}[form]


@pytest.mark.parametrize("width", [256, 240])
def test_a_gradient_in_two_sums_is_the_gradient(monkeypatch, width):
    """What TPUs are told where fsdp is all devices, told to CPU devices; 240 is made in rows."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, tpu, default: tpu(x))
    mesh = make_mesh(MeshConfig(1, 8, 1))
    x, w, by = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 4, width), (6, width), (8, 4, 6)]))
    over = {axis: NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp")) for axis in (0, 1)}
    gradient = lambda x, w, by: jax.vjp(partial(project, "btd,fd->btf"), x, w)[1](by)[1]  # noqa: E731
    with jax.set_mesh(mesh):
        made = jax.jit(gradient, in_shardings=(over[0], over[1], over[0]), out_shardings=over[1])
        text = made.lower(x, w, by).as_text()
        got = made(*(jax.device_put(a, over[i]) for a, i in ((x, 0), (w, 1), (by, 0))))
    parts = re.findall(r"sharding_constraint .*(\[.*far.*\])> : tensor<([0-9x]+)xf32>", text)
    assert parts == [('[{}, {"far"}]', f"6x{width}") if width == 256 else ('[{"far"}, {}]', f"{width}x6")]
    np.testing.assert_allclose(got, jnp.einsum("btd,btf->fd", x, by), rtol=1e-4, atol=1e-4)


def test_biases_are_cut_as_the_heads_of_their_kernels():
    """Qwen 2.5 0.5B has 14 query heads and 2 key/value heads: four tensor shards are refused, and two share them."""
    m = ModelConfig(151936, 896, 4864, 24, 14, 2, 64, model_type="qwen2")
    flat = to_flat(parameter_shardings(m, make_mesh(MeshConfig(1, 4, 2))))
    names = ("q_bias", "k_bias", "v_bias", "k_proj")
    specs = {n: tuple(flat[f"layers.self_attn.{n}"].spec) for n in names}
    assert specs == dict.fromkeys(names[:3], (None, "tensor")) | {"k_proj": (None, "tensor", None, "fsdp")}
    with pytest.raises(ConfigError, match="heads of size 14 does not divide over the 4 shards"):
        parameter_shardings(m, make_mesh(MeshConfig(1, 2, 4)))
    few = parameter_shardings(replace(m, num_attention_heads=16), make_mesh(MeshConfig(1, 2, 4)))
    specs = {n: tuple(to_flat(few)[f"layers.self_attn.{n}"].spec) for n in names}
    assert specs == {"q_bias": (None, "tensor"), "k_bias": (None, None), "v_bias": (None, None)} | {
        "k_proj": (None, None, None, "fsdp")
    }


def test_what_cannot_be_cut_is_refused():
    mesh = make_mesh(MeshConfig(1, 2, 4))
    with pytest.raises(ConfigError, match="layers.self_attn.q_proj: heads of size 6 does not divide over the 4 shards"):
        parameter_shardings(ModelConfig(64, 8, 16, 1, 6, 1, 4), mesh)
    with pytest.raises(ConfigError, match="put one mesh axis on two dimensions"):
        partition_spec(("a", "b"), (4, 4), mesh, {"a": "fsdp", "b": "fsdp"}, "x")
    with pytest.raises(ConfigError, match="does not multiply to the 8 devices"):
        make_mesh(MeshConfig(3, 1, 1))


def test_fresh_parameters_are_the_same_bits_on_any_mesh(params):
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    sharded = jax.jit(partial(init_params, M, 0), out_shardings=parameter_shardings(M, mesh))()
    jax.tree.map(np.testing.assert_array_equal, sharded, jax.jit(partial(init_params, M, 0))())
    assert all(len(x.sharding.device_set) == 4 for x in jax.tree.leaves(sharded))


def test_gelu_is_the_tanh_form_and_keeps_its_constants_in_bfloat16():
    x = np.linspace(-6, 6, 4001)
    exact = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(activated(jnp.asarray(x, jnp.float32), "gelu_pytorch_tanh"), exact, atol=1e-6)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    exact = 0.5 * rounded * (1 + np.tanh(np.sqrt(2 / np.pi) * (rounded + 0.044715 * rounded**3)))
    # Half a unit in the last place: jax.nn.gelu is several off.
    np.testing.assert_allclose(
        np.asarray(activated(jnp.asarray(rounded, jnp.bfloat16), "gelu_pytorch_tanh"), np.float64),
        exact,
        rtol=2**-8,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "activation, plain", [("gelu_pytorch_tanh", partial(jax.nn.gelu, approximate=True)), ("silu", jax.nn.silu)]
)
def test_the_gated_product_has_the_gradients_of_its_plain_form(activation, plain):
    """The plain form in float64: in float32 its slope is 0 where the true one is 1e-5."""
    keys = jax.random.split(jax.random.key(0), 4)
    gate, up = (2 * jax.random.normal(k, (2, 5, 24)) for k in keys[:2])
    down, by_out = jax.random.normal(keys[2], (7, 24)), jax.random.normal(keys[3], (2, 5, 7))
    ours, back = jax.vjp(partial(gated_down, activation=activation), gate, up, down)
    with jax.enable_x64(True):
        naive = lambda gate, up, down: jnp.einsum("btf,df->btd", plain(gate) * up, down)  # noqa: E731
        exact, exactly_back = jax.vjp(naive, *(jnp.asarray(np.asarray(x), jnp.float64) for x in (gate, up, down)))
        expected = exactly_back(jnp.asarray(np.asarray(by_out), jnp.float64))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(back(by_out), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec, shapes",
    [
        # Two elements of d a device: not whole tiles.
        ("btd,nhd->btnh", ((8, 64, 16), (4, 8, 16))),
        ("btnh,dnh->btd", ((8, 64, 4, 8), (16, 4, 8))),
        ("btd,fd->btf", ((8, 64, 16), (24, 16))),
        # Sixteen.
        ("btd,nhd->btnh", ((8, 64, 128), (4, 8, 128))),
        ("btnh,dnh->btd", ((8, 64, 4, 8), (128, 4, 8))),
    ],
)
@pytest.mark.parametrize("wide", [True, False])
def test_a_wide_weight_s_gradient_is_summed_over_devices_in_its_own_dtype(spec, shapes, wide):
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    x, narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    assert project(spec, x, w).dtype == project(spec, x, narrow).dtype == jnp.bfloat16
    out = jax.eval_shape(partial(project, spec), x, w)
    grad_out = jax.random.normal(jax.random.key(2), out.shape).astype(out.dtype)

    def gradients(x, w, grad_out):
        return jax.vjp(partial(project, spec), x, w)[1](grad_out)

    with jax.set_mesh(make_mesh(MeshConfig(1, 8, 1))):
        rows = jax.NamedSharding(jax.sharding.get_mesh(), PartitionSpec("fsdp"))
        placed = (jax.device_put(x, rows), w if wide else narrow, jax.device_put(grad_out, rows))
        by_x, by_w = jax.tree.map(np.asarray, jax.jit(gradients)(*placed))
    plain = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), *(a.astype(jnp.float32) for a in (x, narrow)))[1]
    exact_x, exact_w = plain(grad_out.astype(jnp.float32))
    np.testing.assert_allclose(by_x.astype(np.float32), exact_x, rtol=2**-7, atol=1e-3)
    assert by_w.dtype == (jnp.float32 if wide else jnp.bfloat16)
    error = np.linalg.norm(by_w.astype(np.float32) - exact_w) / np.linalg.norm(exact_w)
    assert (error < 1e-6) == wide, error


@pytest.mark.parametrize(
    "heads, kv_heads, window, cap",
    [
        (4, 2, 100, 0.7),
        pytest.param(4, 2, None, None, marks=pytest.mark.slow),
        pytest.param(2, 2, None, 0.7, marks=pytest.mark.slow),
        pytest.param(4, 1, 384, None, marks=pytest.mark.slow),
    ],
)
def test_the_tpu_kernel_is_attention(heads, kv_heads, window, cap):
    """In interpret mode; the kernel's compiled form needs a TPU."""
    keys = jax.random.split(jax.random.key(0), 4)
    B, T, H = 2, 512, 128
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=False))
    q = q / H**0.5
    segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.01, (B, T)), axis=1).astype(jnp.int32) + 1

    def kernel(q, k, v):
        return splash_attention(q, k, v, segments, window, cap, 128, interpret=True)

    def plain(q, k, v):
        return attention(q, k, v, segments, window, cap)

    np.testing.assert_allclose(kernel(q, k, v), plain(q, k, v), atol=2e-6)

    def gradients(f):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(q, k, v)

    for a, b in zip(gradients(kernel), gradients(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_the_tpu_kernel_is_attention_on_a_mesh():
    keys = jax.random.split(jax.random.key(0), 3)
    B, T, H = 4, 256, 128
    q, k, v = (jax.random.normal(key, (B, T, n, H)) / H**0.25 for key, n in zip(keys, (8, 2, 2), strict=True))
    segments = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // 100 + 1, (B, T))
    # Two key/value heads over four shards: each shard's queries must find their own.
    mesh = make_mesh(MeshConfig(1, 2, 4))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda q, k, v, s: splash_attention(q, k, v, s, None, None, 128, interpret=True))
        on_mesh = np.asarray(run(q, k, v, segments))
    np.testing.assert_allclose(on_mesh, attention(q, k, v, segments, None, None), atol=2e-6)


@pytest.mark.parametrize("T, window, block", [(1024, None, 256), (1024, 130, 128), (1024, 255, 128), (512, 1, 128)])
def test_the_tables_of_the_splash_kernel_are_those_of_its_own_masks(monkeypatch, T, window, block):
    """Ours are made from distances between positions, JAX's from every pair of them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from easylm_mling.model import splash_attention as ours

    def tables():
        kernel = ours._kernel.__wrapped__(T, 2, window, None, block, True)
        return jax.tree.leaves((kernel.fwd_mask_info, kernel.dkv_mask_info, kernel.dq_mask_info))

    made = tables()
    monkeypatch.setattr(ours, "_Causal", masks.CausalMask)
    monkeypatch.setattr(ours, "_Local", masks.LocalMask)
    theirs = tables()
    assert len(made) == len(theirs) > 6
    for a, b in zip(made, theirs, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("heads, kv_heads, window", [(4, 2, None), pytest.param(8, 2, 100, marks=pytest.mark.slow)])
def test_what_cudnn_is_asked_for_is_attention(heads, kv_heads, window):
    """By XLA's form of the same call, on a mesh; cuDNN itself needs a GPU."""
    keys = jax.random.split(jax.random.key(0), 4)
    B, T, H = 4, 256, 32
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=False))
    segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.01, (B, T)), axis=1).astype(jnp.int32) + 1

    def gradients(attend):
        by = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x, segments, window, None))), (0, 1, 2))
        return attend(q, k, v, segments, window, None), by(q, k, v)

    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4))):
        on_mesh = jax.jit(lambda: gradients(partial(cudnn_attention, implementation="xla")))()
        on_mesh = jax.tree.map(np.asarray, on_mesh)
    for a, b in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(gradients(attention)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.slow
def test_layers_in_two_portions_are_one_stack(params):
    tokens = random_tokens((2, 16))

    def loss(params, remat):
        model = nnx.merge(model_graph(M), params)
        positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))
        return jnp.sum(
            jnp.square(model(tokens, positions, jnp.ones((2, 16), jnp.int32), ForwardOptions(jnp.float32, remat)))
        )

    gradient = jax.jit(jax.grad(loss), static_argnames="remat")
    reference = gradient(params, remat=Remat("full"))
    offloading = Remat("save_out", "full", 1, offload=("gate", "o"))
    for first in (1, M.num_hidden_layers, M.num_hidden_layers + 3):
        gradients = gradient(params, remat=Remat("full", "save_dots", first))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradients, reference)
    assert "<host>" in str(jax.make_jaxpr(partial(jax.grad(loss), remat=offloading))(params))
    gradients = gradient(params, remat=offloading)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradients, reference)
    assert Remat("full", "save_dots", 3).portions(5) == [("save_dots", 0, 3), ("full", 3, 5)]
    assert Remat("full", "save_dots", 9).portions(5) == [("save_dots", 0, 5)]


def test_a_lookup_is_the_row_of_the_table_on_any_mesh():
    table = jax.random.normal(jax.random.key(0), (24, 8))
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, 24)
    loss = lambda table, tokens: jnp.sum(jnp.sin(lookup(table, tokens, jnp.float32)) ** 2)  # noqa: E731
    wanted, gradient = table[tokens], jax.grad(lambda t: jnp.sum(jnp.sin(t[tokens]) ** 2))(table)
    for sizes in ((1, 1, 8), (1, 4, 2), (2, 2, 2)):
        with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
            np.testing.assert_array_equal(jax.jit(lambda t, i: lookup(t, i, jnp.float32))(table, tokens), wanted)
            np.testing.assert_allclose(jax.jit(jax.grad(loss))(table, tokens), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_only_a_tpu_is_told_the_order_of_heads(platform):
    traced = jax.jit(jax.vmap(_heads_first)).trace(jnp.zeros((3, 1, 8, 4, 2)))
    told = "LayoutConstraint" in traced.lower(lowering_platforms=(platform,)).as_text()
    assert told == (platform == "tpu")
