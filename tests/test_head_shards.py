"""The head's gradient: as near as one product, whatever the chunks and whoever shares the head."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from easylm_mling.config import MeshConfig
from easylm_mling.model.sharding import make_mesh
from easylm_mling.training.head_shards import HeadShards
from easylm_mling.training.loss import cross_entropy


def bfloat16_gradient_and_reference(mesh, chunk, T=1024, V=96, D=16):
    """The head's gradient [V, D] of bfloat16 hidden states, in chunks; and by one product, exact and rounded to bfloat16.

    Tokens are as frequent as words are: the last half of the vocabulary is never a target.
    """
    B = 8
    keys = jax.random.split(jax.random.key(0), 3)
    h = jax.random.normal(keys[0], (B, T, D)).astype(jnp.bfloat16)
    # All positions share a part, as those of a trained model do: a rare token's gradient has the same sign everywhere.
    h = h + 0.5
    e = (0.3 * jax.random.normal(keys[1], (V, D))).astype(jnp.bfloat16).astype(jnp.float32)
    targets = jnp.minimum(jax.random.geometric(keys[2], 0.1, (B, T)), V // 2).astype(jnp.int32)
    mask = jnp.ones((B, T))
    with jax.set_mesh(make_mesh(MeshConfig(*mesh))):
        where = partial(jax.NamedSharding, jax.sharding.get_mesh())
        rows, columns = where(PartitionSpec(("data", "fsdp"))), where(PartitionSpec("tensor", "fsdp"))
        args = [jax.device_put(x, s) for x, s in ((h, rows), (e, columns), (targets, rows), (mask, rows))]
        gradient = jax.jit(jax.grad(lambda e, h, *x: cross_entropy(h, e, *x, chunk)[0]))
        ours = np.asarray(gradient(args[1], args[0], *args[2:]), np.float64)
    x, w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (h, e))
    scores = x.reshape(-1, D) @ w.T
    likely = np.exp(scores - scores.max(-1, keepdims=True))
    slope = likely / likely.sum(-1, keepdims=True)
    slope[np.arange(B * T), np.asarray(targets).reshape(-1)] -= 1.0
    exact = slope.T @ x.reshape(-1, D)
    narrow = lambda a: np.asarray(jnp.asarray(a, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32), np.float64)  # noqa: E731
    return ours, narrow(narrow(slope).T @ x.reshape(-1, D)), exact


@pytest.mark.parametrize(
    "mesh, chunk",
    [
        ((1, 8, 1), 4),
        ((2, 2, 2), 16),
        *(pytest.param((1, 1, 1), c, marks=pytest.mark.slow) for c in (4, 16, 128, 1024)),
    ],
)
def test_the_head_s_gradient_in_bfloat16_is_as_near_as_one_product_whatever_the_chunks_and_the_devices(mesh, chunk):
    if mesh == (1, 1, 1):
        mesh = (8, 1, 1)
    ours, one_product, exact = bfloat16_gradient_and_reference(mesh, chunk)
    error = lambda a, part: np.linalg.norm(a[part] - exact[part]) / np.linalg.norm(exact[part])  # noqa: E731
    rare = slice(exact.shape[0] // 2, None)
    for part in (slice(None), rare):
        assert error(ours, part) <= 1.2 * error(one_product, part)
    # Nor has it a trend: what was lost in adding up made the rows of rare tokens too large.
    np.testing.assert_allclose(np.linalg.norm(ours[rare]), np.linalg.norm(exact[rare]), rtol=1e-3)


@pytest.mark.parametrize(
    "positions, vocabulary, group",
    [
        (8192, 256_000, 4),  # Gemma 7B, a row of 8192 a device
        (65536, 256_000, 2),
        (10**6, 256_000, 1),  # the head is less than the hidden states
        (512, 262_144, 16),
        (8192, 12_003, 1),  # nothing but 1 divides both
        (1, 48_000, 16),
    ],
)
def test_the_devices_that_share_a_head_move_the_least(positions, vocabulary, group):
    mesh = AbstractMesh((2, 16, 1), ("data", "fsdp", "tensor"))
    assert HeadShards.on(mesh, positions, vocabulary).group == group
    both = HeadShards.on(AbstractMesh((1, 16, 4), ("data", "fsdp", "tensor")), positions, 4 * vocabulary)
    assert both == HeadShards(16, group, 4)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("sizes", [pytest.param((2, 4, 1), marks=pytest.mark.slow), (1, 4, 2)])
def test_the_loss_is_one_whoever_shares_the_head(group, sizes, monkeypatch):
    """A head of 24 rows for every shard, rows and chunks that do not divide, a soft cap, and a z-loss."""
    monkeypatch.setattr(HeadShards, "on", lambda mesh, positions, rows: HeadShards(sizes[1], group, sizes[2]))
    B, T, D, V = 8, 10, 8, 24 * sizes[2]
    h, e = jax.random.normal(jax.random.key(0), (B, T, D)), jax.random.normal(jax.random.key(1), (V, D))
    targets = jax.random.randint(jax.random.key(2), (B, T), 0, V)
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (B, T)).astype(jnp.float32)

    def loss(h, e):
        total, entropy, z = cross_entropy(h, e, targets, mask, 4, 0.01, 0.9)
        return total, (entropy, z)

    wanted = jax.value_and_grad(loss, (0, 1), has_aux=True)(h, e)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        sharded = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(h, e))
        (total, _), alone = sharded[0], jax.jit(loss)(h, e)[0]
    np.testing.assert_array_equal(total, alone)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), sharded, wanted)
