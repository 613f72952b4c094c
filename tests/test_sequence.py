"""Rows whose positions are divided over devices: the same attention, losses, gradients and runs as on one device."""

import io
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from processes import ROOT, SMALL
from rich.console import Console

from easylm_mling.checkpoint.reading import load_data_state
from easylm_mling.config import (
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    load,
)
from easylm_mling.errors import ConfigError
from easylm_mling.model import sequence_shares, sharding
from easylm_mling.model.attention import attention
from easylm_mling.model.params import to_flat
from easylm_mling.model.sequence_shares import attention_over_shares, divided, share_attention, share_order
from easylm_mling.model.sharding import batch_sharding, check_run, make_mesh, own_rows, parameter_shardings
from easylm_mling.model.splash_attention import _kernel, splash_from
from easylm_mling.monitoring.metrics import TIMINGS, read_metrics
from easylm_mling.run import replay_check
from easylm_mling.run.train import train
from easylm_mling.training.state import abstract_batch, init_params, state_shardings
from easylm_mling.training.step import attention_on, batch_loss, jit_eval_step, step_config

T = 64
# Local and global layers, fewer key/value heads than query heads, and a soft cap.
MODEL = ModelConfig(
    96,
    32,
    64,
    2,
    4,
    2,
    16,
    model_type="gemma2",
    sliding_window=6,
    sliding_window_pattern=2,
    attn_logit_softcapping=20.0,
)


def make_config(mesh=(1, 1, 1, 1), **training) -> RunConfig:
    sources = {"a": SourceConfig(("x",), 1.0), "b": SourceConfig(("y",), 1.0)}
    train = TrainConfig(budget_tokens=8 * T * 100, batch_size=8, compute_dtype="float32", loss_chunk=5, **training)
    return RunConfig("unused", MODEL, DataConfig("unused", sources, sequence_length=T), train, mesh=MeshConfig(*mesh))


def make_batch(rows=8):
    """Several documents a row, of which some go over the borders of chunks, and padding behind them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 96, (rows, T + 1), dtype=np.int32)
    begins = rng.random((rows, T)) < 0.08
    begins[:, 0] = True
    segments = np.cumsum(begins, axis=1).astype(np.int32)
    index = np.arange(T, dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    real = index < rng.integers(T // 2, T + 1, (rows, 1))
    mask = (rng.random((rows, T)) < 0.8) & real
    return {
        "tokens": tokens[:, :-1] * real,
        "targets": tokens[:, 1:] * real,
        "loss_mask": mask.astype(np.float32),
        "segment_ids": segments * real,
        "positions": positions.astype(np.int32) * real,
        "source": rng.integers(0, 2, rows).astype(np.int32),
    }


def mesh_of(config) -> jax.sharding.Mesh:
    m = config.mesh
    return make_mesh(m, jax.devices()[: m.data * m.fsdp * m.tensor * m.sequence])


def placed(batch, mesh, count):
    return jax.device_put(divided(batch, mesh, count), batch_sharding(mesh))


# Shares


@pytest.mark.parametrize("count", [2, 4, 16])
def test_every_share_has_the_same_work_under_a_causal_mask(count):
    order = share_order(512, count)
    np.testing.assert_array_equal(np.sort(order, axis=None), np.arange(512))
    assert np.ptp(np.sum(order + 1, axis=1)) == 0
    assert (
        np.ptp(np.sum(np.arange(1, 513).reshape(count, -1), axis=1)) > 0
    )  # as shares that follow one another have not


@pytest.mark.parametrize("count", [2, 4])
def test_the_kernel_of_every_share_visits_as_many_blocks(count):
    tables = _kernel(4096, 2, None, None, 128, True, shares=count)
    for table in (tables.fwd_mask_info, tables.dq_mask_info, tables.dkv_mask_info):
        assert table is not None
        visited = np.count_nonzero(np.split(np.asarray(table.block_mask), count, axis=1), axis=(1, 2, 3))
        assert visited.tolist() == [32 * 33 // 2 // count] * count


def test_processes_that_share_rows_have_the_shares_of_their_own_devices(monkeypatch):
    """Two groups of four devices, with two rows each: whoever holds which devices, together they hold all shares."""
    mesh, batch = make_mesh(MeshConfig(1, 2, 1, 4)), make_batch(4)
    whole = divided(batch, mesh, 4)
    assert whole["tokens"].shape == (16, T // 4) and whole["source"].tolist() == [
        s for pair in (batch["source"][:2], batch["source"][2:]) for _ in range(4) for s in pair
    ]
    # The first row's share 1: its chunks 1 and 6. Device 1 has it, beside that of the second row.
    chunks = batch["tokens"][0].reshape(8, -1)
    np.testing.assert_array_equal(whole["tokens"][2], np.concatenate([chunks[1], chunks[6]]))
    for devices in (4, 2, 1):
        parts = []
        for start in range(0, 8, devices):
            here = range(start, start + devices)
            for module in (sharding, sequence_shares):
                monkeypatch.setattr(module, "own_places", lambda _, here=here: here)
            rows = own_rows(mesh, 4, 4)
            assert list(rows) == ([0, 1] if start < 4 else [2, 3])
            parts.append(divided({name: x[rows.start : rows.stop] for name, x in batch.items()}, mesh, 4))
        for name, x in whole.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), x)


# Attention


def compare_attention(mesh, attend, tile, heads, kv_heads, window, cap, length, width, rows):
    count, wanted = mesh.sequence, jax.random.split(jax.random.key(0), 5)
    shape = lambda n: (rows, length, n, width)  # noqa: E731
    q, k, v, factor = (
        np.asarray(jax.random.normal(key, shape(n)))
        for key, n in zip(wanted, (heads, kv_heads, kv_heads, heads), strict=False)
    )
    q = q / width**0.5
    begins = jax.random.bernoulli(wanted[4], 6 / length, (rows, length))
    segments = np.asarray(jnp.cumsum(begins, axis=1).astype(jnp.int32))  # the first is 0

    def results(attend, q, k, v, segments, factor):
        loss = lambda *x: jnp.sum(jnp.sin(attend(*x, segments, window, cap)) * factor)  # noqa: E731
        return attend(q, k, v, segments, window, cap), *jax.grad(loss, (0, 1, 2))(q, k, v)

    whole = jax.jit(partial(results, attention))(q, k, v, segments, factor)
    on = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor * count])
    over = partial(attention_over_shares, count=count, attend=attend, tile=tile)
    with jax.set_mesh(on):
        given = placed(dict(zip("qkvsf", (q, k, v, segments, factor), strict=True)), on, count)
        shares = jax.jit(partial(results, over))(*(given[name] for name in "qkvsf"))
        shares = [np.asarray(x) for x in shares]
    for ours, theirs in zip(shares, whole, strict=True):
        np.testing.assert_allclose(ours, divided({"": np.asarray(theirs)}, on, count)[""], atol=5e-5)


@pytest.mark.parametrize(
    "mesh, window",
    [
        (MeshConfig(1, 2, 1, 4), None),
        (MeshConfig(1, 2, 1, 4), 5),
        pytest.param(MeshConfig(2, 1, 2, 2), 17, marks=pytest.mark.slow),
        *(pytest.param(MeshConfig(1, 2, 1, 4), w, marks=pytest.mark.slow) for w in (1, 8, 9, 10, 40)),
        *(pytest.param(MeshConfig(2, 1, 2, 2), w, marks=pytest.mark.slow) for w in (None, 18, 40)),
        *(pytest.param(MeshConfig(1, 1, 1, 2), w, marks=pytest.mark.slow) for w in (None, 5)),
    ],
)
def test_shares_attend_as_whole_rows_do(mesh, window):
    """Windows that reach into the chunk before (8 positions in 4 shares, 16 in 2), into all of it, and beyond it."""
    attend = partial(share_attention, count=mesh.sequence)
    compare_attention(mesh, attend, 1, 4, 2, window, 0.7, T, 8, rows=4)


@pytest.mark.parametrize(
    "count, heads, kv_heads, window, cap",
    [
        (2, 2, 1, None, None),  # all keys
        (2, 2, 1, 100, None),  # those of the chunk before
        pytest.param(4, 4, 2, 300, 0.7, marks=pytest.mark.slow),
        pytest.param(4, 4, 4, None, 0.7, marks=pytest.mark.slow),
    ],
)
def test_the_tpu_kernel_attends_in_shares_as_in_whole_rows(count, heads, kv_heads, window, cap):
    """In interpret mode; the kernel's compiled form needs a TPU."""
    attend = partial(splash_from, count=count, block=128, interpret=True)
    compare_attention(MeshConfig(1, 1, 1, count), attend, 128, heads, kv_heads, window, cap, 256 * count, 128, rows=1)


# The step


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, 0)


def gradients(config, params):
    mesh, c = mesh_of(config), step_config(config, mesh_of(config))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, state_shardings(config, mesh).params)
        batch = placed(make_batch(), mesh, config.mesh.sequence)
        of = jax.value_and_grad(lambda p, b: batch_loss(p, b, c), has_aux=True)
        return jax.tree.map(np.asarray, jax.jit(of)(sharded, batch))


@pytest.fixture(scope="module")
def on_one_device(params):
    return gradients(make_config(), params)


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 2, 1, 4),
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in ((1, 1, 1, 2), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8))
        ),
    ],
)
def test_losses_and_every_gradient_are_those_of_one_device(on_one_device, params, mesh):
    (total, sums), gradient = gradients(make_config(mesh), params)
    (wanted, wanted_sums), wanted_gradient = on_one_device
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    np.testing.assert_allclose(sums, wanted_sums, rtol=1e-6)
    for path, g in to_flat(wanted_gradient).items():
        np.testing.assert_allclose(to_flat(gradient)[path], g, atol=2e-6 * np.abs(g).max(), rtol=1e-4, err_msg=path)


def test_validation_sums_are_those_of_one_device(params):
    batch = make_batch()
    batch["ends"] = batch["loss_mask"] * (np.random.default_rng(1).random((8, T)) < 0.2).astype(np.float32)
    results = []
    for config in (make_config(), make_config((1, 2, 1, 4))):
        mesh = mesh_of(config)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(params, state_shardings(config, mesh).params)
            results.append(
                [np.asarray(x) for x in jit_eval_step(config, mesh)(sharded, placed(batch, mesh, config.mesh.sequence))]
            )
    assert all(x.all() for x in results[0])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


def test_parameters_are_cut_over_all_devices_that_share_rows():
    config = make_config((1, -1, 2, 2))
    mesh = make_mesh(config.mesh)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    kernel = to_flat(parameter_shardings(MODEL, mesh))["layers.mlp.up_proj"]
    assert kernel.shard_shape((2, 64, 32)) == (2, 64 // 2, 32 // 4)
    batch = abstract_batch(config, mesh)
    assert batch["tokens"].shape == (16, T // 2) and batch["source"].shape == (16,)
    assert batch["tokens"].sharding.shard_shape((16, T // 2)) == (4, T // 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": {"sequence_length": 60}}, "data.sequence_length=60 does not divide into the 8 chunks of mesh.sequence=4"),
        ({"train": {"batch_size": 7}}, "7 rows do not divide over the 2 shards of mesh.data x mesh.fsdp"),
        ({"lora": LoraConfig(dropout=0.1)}, "lora.dropout=0.1 is drawn for whole rows, which mesh.sequence=4 divides"),
        ({"mesh": {"sequence": 3}}, "does not multiply to the 8 devices here; change mesh.data, mesh.fsdp, mesh.tensor or"),
        ({"mesh": {"sequence": 0}}, "mesh.sequence=0 must be positive"),
        ({"mesh": {"sequence": -1}}, "mesh.sequence=-1 must be positive"),
        ({"train": {"attention": "cudnn"}}, "train.attention=cudnn takes whole rows, which mesh.sequence=4 divides"),
        ({"train": {"attention": "splash"}}, "multiple of 128; here are cpu devices, data.sequence_length=64, heads 16 wide, in chunks of 8 by mesh.sequence=4"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused_in_one_line(change, message):
    config = make_config((1, 2, 1, 4))
    with pytest.raises(ConfigError) as raised:
        config = replace(
            config, **{k: replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
        )
        mesh = make_mesh(config.mesh)
        check_run(config, mesh)
        attention_on(config, mesh)
    assert message in str(raised.value) and "\n" not in str(raised.value)


# Whole runs


def run(run_dir, *overrides):
    settings = [*SMALL, "mesh.cpu_devices=0", f"run_dir={run_dir}", "eval.every_steps=5", *overrides]
    assert train(load(["configs/demo.yaml"], settings), Console(file=io.StringIO())) == 0


def lines_of(run_dir, kind):
    return [{k: v for k, v in x.items() if k not in TIMINGS} for x in read_metrics(run_dir / "metrics.jsonl", kind)]


SHARED = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=1", "mesh.sequence=4", "train.accumulation_steps=2")
WHOLE = ("mesh.data=1", "mesh.fsdp=8", "mesh.tensor=1", "train.accumulation_steps=1")


@pytest.mark.slow
def test_a_run_in_shares_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(tmp_path / "undisturbed", *SHARED)
    # Between two checkpoints.
    run(tmp_path / "stopped", *SHARED, "train.stop_at_step=3")
    run(tmp_path / "stopped", *SHARED)
    undisturbed, stopped = (lines_of(tmp_path / name, "train") for name in ("undisturbed", "stopped"))
    assert undisturbed == stopped and len(stopped) == 10


@pytest.mark.slow
def test_a_run_in_shares_is_a_run_of_whole_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(tmp_path / "whole", *WHOLE)
    run(tmp_path / "shares", *SHARED)
    run(tmp_path / "moved", *WHOLE, "train.stop_at_step=5")
    run(tmp_path / "moved", *SHARED)
    for name in ("shares", "moved"):
        for kind in ("train", "eval"):
            ours, theirs = lines_of(tmp_path / name, kind), lines_of(tmp_path / "whole", kind)
            assert len(ours) == len(theirs) > 1
            np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], rtol=1e-4)
        # The same data in the same order, whoever has it.
        jax.tree.map(np.testing.assert_array_equal, *(load_data_state(tmp_path / n) for n in ("whole", name)))


@pytest.mark.slow
def test_processes_that_share_rows_train_as_one_does(tmp_path):
    """One row on four devices, of which two processes have two each."""
    for count in (1, 2):
        processes.run(tmp_path / f"of-{count}", count, "mesh.data=1", "mesh.fsdp=1", "mesh.sequence=4")
    one, two = (lines_of(tmp_path / f"of-{count}", "train") for count in (1, 2))
    assert one == two and len(one) == 10


def test_a_replay_is_compared_with_steps_of_the_same_shares_only():
    programs = {
        replay_check._program(config, mesh_of(config), {})
        for config in (make_config((1, 4, 1, 1)), make_config((1, 2, 1, 2)), make_config((1, 1, 1, 4)))
    }
    assert len(programs) == 3
