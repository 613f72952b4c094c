"""A run with `train.ema`: resumed to the bit, measured beside the raw parameters, exported, and refused where it cannot be."""

import io

import numpy as np
import pytest
from processes import ROOT, SMALL
from rich.console import Console
from safetensors.numpy import load_file

from easylm_mling.checkpoint.reading import load_info, open_store
from easylm_mling.cli.main import main
from easylm_mling.config import RunConfig, load
from easylm_mling.errors import ConfigError
from easylm_mling.monitoring.metrics import TIMINGS, read_metrics
from easylm_mling.run.train import train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "key, message",
    [
        ("train.ema.decay=1", "train.ema.decay=1.0 must be above 0 and below 1"),
        ("train.ema.decay=0", "must be above 0"),
        ("train.ema.decay=.nan", "must be above 0"),
        ("train.ema.from_step=0", "train.ema: give decay"),
        ("train.ema.from_step=-1", "train.ema: give decay"),
        ("train.ema.from_step=10", "leaves nothing to average: the run has 10 steps"),
        ("train.ema.rate=0.9", "rate"),
    ],
)
def test_settings_that_average_nothing_are_refused(tmp_path, key, message):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny(tmp_path, key)
    assert "\n" not in str(caught.value)


def tiny(run_dir, *overrides) -> RunConfig:
    settings = [*SMALL, "mesh.cpu_devices=0", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", "eval.every_steps=5"]
    return load(["configs/demo.yaml"], [*settings, f"run_dir={run_dir}", *overrides])


def run(run_dir, *overrides) -> int:
    return train(tiny(run_dir, *overrides), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_device):
    run_dir = tmp_path_factory.mktemp("ema") / "run"
    assert run(run_dir, "train.ema.decay=0.8") == 0
    return run_dir


def lines(run_dir, kind) -> list[dict]:
    return [{k: v for k, v in x.items() if k not in TIMINGS} for x in read_metrics(run_dir / "metrics.jsonl", kind)]


def test_stopped_and_resumed_is_never_stopped(whole, tmp_path):
    assert run(tmp_path / "run", "train.ema.decay=0.8", "train.stop_at_step=3") == 0
    with pytest.raises(ConfigError, match=r"train\.ema\.decay was 0\.8, now 0\.9"):
        run(tmp_path / "run", "train.ema.decay=0.9")
    assert run(tmp_path / "run", "train.ema.decay=0.8") == 0
    assert lines(tmp_path / "run", "train") == lines(whole, "train")
    assert lines(tmp_path / "run", "eval") == lines(whole, "eval")
    # Every bit of the state counts in them.
    digests = load_info(whole)["digests"]
    assert load_info(tmp_path / "run")["digests"] == digests
    parts = {name.split("'")[1] for name in digests}
    assert parts == {"params", "average", "training", "data"}
    average, params = ({n for n in digests if n.startswith(f"['{part}']")} for part in ("average", "params"))
    assert {digests[n] for n in average}.isdisjoint({digests[n] for n in params}) and len(average) == len(params)


def test_it_is_measured_beside_the_raw_parameters(whole):
    first, *_, last = lines(whole, "eval")
    raw = {k: v for k, v in first.items() if k not in ("kind", "step", "ema")}
    assert first["ema"] == raw and last["ema"].keys() == raw.keys()
    # A slow average of parameters that still fall fast is behind them.
    assert last["loss"] < last["ema"]["loss"] < first["loss"]


def test_the_average_is_exported_as_it_is_saved(whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export-hf", str(whole), str(out), "--ema", "--dtype", "float32", "--verify"]) == 0
    assert "step 10, averaged by train.ema," in capsys.readouterr().out
    assert "running average" in (out / "README.md").read_text(encoding="utf-8")
    stored = open_store(whole / "checkpoints" / "10", "embed_tokens", (4096, 32), part="average").read().result()
    np.testing.assert_array_equal(load_file(out / "model.safetensors")["model.embed_tokens.weight"], stored)
    assert read_metrics(whole / "metrics.jsonl", "export")[-1]["ema"] is True
    assert main(["summary", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert "averaged parameters" in shown


@pytest.mark.slow
def test_without_it_nothing_of_it_is_saved_and_it_cannot_begin_later(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert run(run_dir, "train.stop_at_step=4") == 0
    assert not (run_dir / "checkpoints" / "4" / "average").exists()
    assert not any("average" in name for name in load_info(run_dir)["digests"])
    assert all("ema" not in line for line in read_metrics(run_dir / "metrics.jsonl", "eval"))
    with pytest.raises(ConfigError, match=r"train\.ema.* was None, now"):
        run(run_dir, "train.ema.decay=0.8")
    assert main(["export-hf", str(run_dir), str(tmp_path / "out"), "--ema"]) == 2
    assert "holds no average; train with train.ema" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_of_adapters_the_average_is_exported_alone_and_merged(whole, tmp_path):
    run_dir, settings = tmp_path / "run", ("train.ema.decay=0.8", "lora.rank=2", "lora.projections=[q_proj]")
    assert run(run_dir, *settings, f"init_from={whole}", "train.stop_at_step=4") == 0
    where = run_dir / "checkpoints" / "4"
    a, b = (
        open_store(where, f"lora.layers.q_proj.{factor}", shape, part="average").read().result()
        for factor, shape in (("a", (2, 2, 32)), ("b", (2, 4, 8, 2)))
    )
    assert main(["export-hf", str(run_dir), str(tmp_path / "alone"), "--adapter", "--ema", "--verify"]) == 0
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight".format
    np.testing.assert_array_equal(alone[name("A")], a[1])
    np.testing.assert_array_equal(alone[name("B")], b[1].reshape(32, 2))
    assert main(["export-hf", str(run_dir), str(tmp_path / "merged"), "--ema", "--dtype", "float32"]) == 0
    kernel = "model.layers.1.self_attn.q_proj.weight"
    assert main(["export-hf", str(whole), str(tmp_path / "base"), "--dtype", "float32"]) == 0
    base, merged = (load_file(tmp_path / d / "model.safetensors")[kernel] for d in ("base", "merged"))
    np.testing.assert_allclose(merged - base, 16 * b[1].reshape(32, 2) @ a[1], atol=1e-6)
