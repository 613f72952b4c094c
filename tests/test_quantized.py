"""Products of 8 bits: what they compute, which products they are, and that a run with them is as exact as any other."""

import io
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from processes import ROOT, SMALL
from rich.console import Console
from test_step import make_batch, make_config, run

from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config import LoraConfig, MeshConfig, ProductsConfig, RunConfig, TrainConfig, differences, load
from easylm_mling.errors import ConfigError
from easylm_mling.hf.card import _recipe
from easylm_mling.model.params import parameter_table
from easylm_mling.model.projection import project
from easylm_mling.model.quantized import check_products
from easylm_mling.model.sharding import make_mesh
from easylm_mling.monitoring.metrics import TIMINGS, read_metrics
from easylm_mling.run.train import train
from easylm_mling.training.state import abstract_batch, abstract_state, init_params
from easylm_mling.training.step import batch_loss, jit_eval_step, step_config

pytest.importorskip("qwix", reason="train.products needs qwix, of the extra `quantized`")

FORWARD, BOTH, FP8 = ProductsConfig("int8"), ProductsConfig("int8", "int8"), ProductsConfig("fp8", "fp8")
SPECS = {
    "btd,nhd->btnh": ((8, 16, 32), (4, 16, 32)),
    "btnh,dnh->btd": ((8, 16, 4, 16), (32, 4, 16)),
    "btd,fd->btf": ((8, 16, 32), (64, 32)),
    "btf,df->btd": ((8, 16, 64), (32, 64)),
}
KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def operands(spec, dtype=jnp.float32):
    """x, weight and the gradient of the output. Rows differ in size, as those of activations do."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = (jax.random.normal(k, shape) for k, shape in zip(keys, SPECS[spec], strict=False))
    x = x * jnp.exp(jax.random.normal(keys[2], x.shape[:2])).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    out = jax.eval_shape(lambda: jnp.einsum(spec, x, w)).shape
    return tuple(a.astype(dtype) for a in (x, w, jax.random.normal(keys[2], out)))


def largest_positive(a, letters, out):
    """`a` with vectors turned round whose largest value is negative: that one is as near to one level as to another."""
    summed = tuple(i for i, letter in enumerate(letters) if letter not in out)
    return jnp.where(jnp.max(a, summed, keepdims=True) == jnp.max(jnp.abs(a), summed, keepdims=True), a, -a)


def gradients(project, x, w, grad_out):
    return jax.vjp(project, x, w)[1](grad_out)


def int8_by_hand(a, letters, out):
    """The nearest of 256 levels; a level is a 255th of what a vector that is summed over spans."""
    a = np.asarray(a, np.float64)
    summed = tuple(i for i, letter in enumerate(letters) if letter not in out)
    level = np.abs(a).max(axis=summed, keepdims=True) / 127.5
    return np.clip(np.round(a / level), -128, 127) * level


def error(found, exact):
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("spec", SPECS)
def test_the_product_is_that_of_the_nearest_levels(spec):
    inputs, out = spec.split("->")
    letters = inputs.split(",")
    x, w = (largest_positive(a, of_a, out) for a, of_a in zip(operands(spec), letters, strict=False))
    by_hand = np.einsum(spec, *(int8_by_hand(a, of_a, out) for a, of_a in zip((x, w), letters, strict=True)))
    np.testing.assert_allclose(project(spec, x, w, FORWARD), by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("products, least, most", [(FORWARD, 0.002, 0.02), (FP8, 0.01, 0.06)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_error_is_that_of_8_bits(products, least, most, dtype):
    spec = "btd,fd->btf"
    x, w, _ = operands(spec, dtype)
    found = project(spec, x, w, products)
    assert found.dtype == dtype
    assert least < error(found, np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))) < most


@pytest.mark.parametrize("spec", SPECS)
def test_rounding_has_the_gradient_of_the_identity(spec):
    x, w, grad_out = operands(spec)
    plain_x, plain_w = gradients(partial(jnp.einsum, spec), x, w, grad_out)
    by_x, by_w = gradients(partial(project, spec, products=FORWARD), x, w, grad_out)
    for found, plain in ((by_x, plain_x), (by_w, plain_w)):
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
    by_x, by_w = gradients(partial(project, spec, products=BOTH), x, w, grad_out)
    assert 0.002 < error(by_x, plain_x) < 0.02
    np.testing.assert_allclose(by_w, plain_w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("products", [BOTH, FP8])
def test_what_is_not_finite_stays_so(products, bad):
    # Few: XLA's maximum of many values on a CPU leaves out a NaN.
    x, w, grad_out = operands("btd,fd->btf")
    x, w, grad_out = x[:1, :8], w[:8], grad_out[:1, :8, :8]
    found = project("btd,fd->btf", x.at[0, 3, 4].set(bad), w, products)
    assert not np.isfinite(found[0, 3]).any() and np.isfinite(found[0, 4]).all()
    by_x = gradients(partial(project, "btd,fd->btf", products=products), x, w, grad_out.at[0, 3, 1].set(bad))[0]
    assert not np.isfinite(by_x[0, 3]).any() and np.isfinite(by_x[0, 4]).all()


def test_vectors_of_zeros_are_zeros():
    x, w, grad_out = operands("btd,fd->btf")
    zeros = jnp.zeros_like
    assert not project("btd,fd->btf", zeros(x), w, BOTH).any()
    assert not project("btd,fd->btf", x, zeros(w), FP8).any()
    by_x, by_w = gradients(partial(project, "btd,fd->btf", products=BOTH), x, w, zeros(grad_out))
    assert not by_x.any() and not by_w.any()


@pytest.mark.parametrize("spec", SPECS)
def test_sharded_is_one_device(spec):
    """Integers are summed exactly, whatever device a part lies on; a scale may differ in its last bit."""
    x, w, grad_out = operands(spec)
    inputs, out = spec.split("->")
    of_x, of_w = inputs.split(",")
    x, w, grad_out = (
        largest_positive(a, own, other) for a, own, other in ((x, of_x, out), (w, of_w, out), (grad_out, out, of_x))
    )
    run = jax.jit(
        lambda x, w, g: (project(spec, x, w, BOTH), gradients(partial(project, spec, products=BOTH), x, w, g))
    )
    axes = {"b": ("data", "fsdp"), "d": "fsdp", "n": "tensor", "f": "tensor"}
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = []
        for a, letters in ((x, of_x), (w, of_w), (grad_out, out)):
            # Activations keep the embed axis whole.
            names = [None if letter == "d" and "b" in letters else axes.get(letter) for letter in letters]
            placed.append(jax.device_put(a, NamedSharding(mesh, PartitionSpec(*names))))
        sharded, (by_x, by_w) = jax.tree.map(np.asarray, run(*placed))
    one, (one_x, one_w) = run(x, w, grad_out)
    for found, expected in ((sharded, one), (by_x, one_x), (by_w, one_w)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def config_of(products, mesh=(1, 1, 1), lora=None, **settings) -> RunConfig:
    config = make_config(mesh)
    return replace(config, train=replace(config.train, products=products, **settings), lora=lora)


def traced(config):
    """The products of a training step: (dtype of both operands, their shapes)."""
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor])
    with jax.set_mesh(mesh):
        c, state = step_config(config, mesh), abstract_state(config, mesh)
        loss = lambda params, frozen, batch: batch_loss({**frozen, **params}, batch, c)[0]  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(state.params, state.frozen, abstract_batch(config, mesh))
    return list(dots(jaxpr.jaxpr))


def dots(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(str(v.aval.dtype) for v in eqn.invars), {v.aval.shape for v in eqn.invars}
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from dots(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("products, times", [(FORWARD, 1), (BOTH, 2), (FP8, 2)])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3)])
def test_the_seven_projections_are_of_8_bits_and_nothing_else(products, times, lora):
    config = config_of(products, lora=lora, remat="none", compute_dtype="bfloat16")
    kernels = [p.shape[1:] for p in parameter_table(config.model) if p.path.endswith(KERNELS)]
    assert len(kernels) == 7
    kind = {"int8": "int8", "fp8": "float8_e4m3fn"}[products.forward]
    narrow = [shapes for dtypes, shapes in traced(config) if dtypes == (kind, kind)]
    wide = [(dtypes, shapes) for dtypes, shapes in traced(config) if dtypes != (kind, kind)]
    with_kernel = [next(s for s in shapes if s in kernels) for shapes in narrow]
    assert sorted(with_kernel) == sorted(kernels * times)
    assert all("8" not in dtype for dtypes, _ in wide for dtype in dtypes)
    # Head and adapters are there, and wide: they have an axis of the vocabulary, or of the rank.
    vocabulary, rank = config.model.vocab_size, 3
    assert any(vocabulary in s for _, shapes in wide for s in shapes)
    assert any(rank in s for _, shapes in wide for s in shapes) == bool(lora)


def test_without_them_no_product_is_of_8_bits():
    assert all("8" not in dtype for dtypes, _ in traced(config_of(None)) for dtype in dtypes)


def test_held_out_losses_are_measured_without_them():
    def measured(products):
        config = config_of(products)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            return jit_eval_step(config, mesh).lower(init_params(config.model, 0), make_batch()).as_text()

    assert measured(BOTH) == measured(None)


def loss_and_gradient(remat):
    config = config_of(BOTH, remat=remat)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    c, params = step_config(config, mesh), init_params(config.model, 0)
    return jax.jit(jax.value_and_grad(lambda p: batch_loss(p, jax.tree.map(jnp.asarray, make_batch()), c)[0]))(params)


@pytest.mark.parametrize("remat", ["full", pytest.param("save_dots", marks=pytest.mark.slow)])
def test_what_is_computed_again_is_what_it_was(remat):
    """But for values that lie as near to one level as to another."""
    (loss, gradient), (kept, by_kept) = loss_and_gradient(remat), loss_and_gradient("none")
    np.testing.assert_allclose(loss, kept, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(by_kept), strict=True):
        assert error(a, b) < 0.01


@pytest.mark.slow
def test_a_step_on_a_mesh_is_that_of_one_device():
    """Nearly: what is summed in another order before it is rounded may fall on the other side of a level."""

    def losses(mesh):
        _, (metrics,) = run(config_of(BOTH, mesh), [make_batch()])
        return float(np.sum(metrics["loss_sum"])), float(metrics["gradient_norm"])

    np.testing.assert_allclose(losses((2, 2, 2)), losses((1, 1, 1)), rtol=2e-3)


def tiny(run_dir, *overrides) -> RunConfig:
    settings = [*SMALL, "mesh.cpu_devices=0", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", f"run_dir={run_dir}"]
    return load(["configs/demo.yaml"], [*settings, "train.products.forward=int8", *overrides])


def test_they_belong_to_the_run():
    """As train.compute_dtype does: they change what is computed, so neither a resume nor --change may."""
    changes = [c for old in (None, FORWARD, FP8) for c in differences(config_of(old), config_of(BOTH))]
    keys = [c.key for c in changes]
    assert {"train.products.forward", "train.products.backward"} <= set(keys), keys
    assert not any(c.setting.free or c.setting.change or c.setting.outside_step for c in changes)


@pytest.mark.slow
def test_stopped_and_resumed_is_never_stopped(tmp_path, monkeypatch, one_device):
    monkeypatch.chdir(ROOT)

    def go_on(name, *overrides):
        assert train(tiny(tmp_path / name, *overrides), Console(file=io.StringIO())) == 0
        lines = read_metrics(tmp_path / name / "metrics.jsonl", "train")
        return [{k: v for k, v in x.items() if k not in TIMINGS} for x in lines]

    both = "train.products.backward=int8"
    whole = go_on("whole", both)
    go_on("stopped", both, "train.stop_at_step=3")
    with pytest.raises(ConfigError, match=r"train\.products\.backward was int8, now None"):
        go_on("stopped")
    assert go_on("stopped", both) == whole
    assert load_info(tmp_path / "stopped")["digests"] == load_info(tmp_path / "whole")["digests"]
    config = tiny(tmp_path / "whole", both)
    assert "computed in float32, the layers' projections with int8 products forward, int8 backward" in _recipe(
        config, 1, [], []
    )


@pytest.mark.parametrize(
    "device, products, message",
    [
        (("tpu", "TPU v4"), FORWARD, "no faster than bfloat16 on v4; leave train.products out"),
        (("tpu", "TPU v6 lite"), FP8, "no faster than bfloat16 on v6e; use int8"),
        (("tpu", "TPU7x"), BOTH, "no faster than bfloat16 on tpu7x; use fp8"),
        (("tpu", "TPU v3"), FORWARD, "no faster than bfloat16 on TPU v3; leave"),
        (("gpu", "NVIDIA A100", "8.0"), FP8, "NVIDIA A100 has compute capability 8.0, and fp8 needs 8.9; leave"),
        (("gpu", "NVIDIA H100", "9.0"), FORWARD, "int8 is for TPUs; on this GPU use fp8"),
        (("tpu", "TPU v5 lite"), FORWARD, None),
        (("tpu", "TPU v5"), BOTH, None),
        (("tpu", "TPU v6 lite"), BOTH, None),
        (("tpu", "TPU7x"), FP8, None),
        (("gpu", "NVIDIA L4", "8.9"), FP8, None),
        (("gpu", "NVIDIA B200", "10.0"), FP8, None),
        (("cpu", "cpu"), FP8, None),
        (("tpu", "TPU v4"), None, None),
    ],
)
def test_chips_that_gain_nothing_are_refused(device, products, message):
    platform, kind, *capability = device
    device = Mock(platform=platform, device_kind=kind, compute_capability="".join(capability))
    if message is None:
        check_products(products, device)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        check_products(products, device)
    assert "\n" not in str(caught.value)


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("easylm_mling.model.quantized.find_spec", lambda name: None)
    check_products(None, jax.devices()[0])
    with pytest.raises(ConfigError, match=r"pip install 'easylm-mling\[quantized\]'"):
        check_products(FORWARD, jax.devices()[0])


@pytest.mark.parametrize(
    "key, message",
    [
        ("forward=int4", "train.products.forward='int4' must be 'int8' or 'fp8'; leave train.products out for neither"),
        ("forward=null", "forward"),
        ("backward=bfloat16", "train.products.backward='bfloat16' must be 'int8' or 'fp8', or null"),
    ],
)
def test_other_kinds_are_refused(key, message):
    with pytest.raises(ConfigError, match=message):
        load([str(ROOT / "configs/demo.yaml")], [f"train.products.{key}"])
    assert TrainConfig(budget_tokens=1).products is None
