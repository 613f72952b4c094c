"""A run with adapters: it resumes to the bit, keeps only adapters, and refuses another base."""

import io
import json
import os
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from hf_models import save, transformers_model
from processes import ROOT
from rich.console import Console

from easylm_mling.checkpoint.base import find_base
from easylm_mling.checkpoint.parameters import load_adapters, load_params
from easylm_mling.checkpoint.reading import load_data_state, load_info
from easylm_mling.cli.main import main
from easylm_mling.config import ModelConfig, RunConfig, load_mixer
from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError
from easylm_mling.hf.importing import import_hf, widest_mesh
from easylm_mling.model.params import to_flat
from easylm_mling.monitoring.metrics import TIMINGS, read_metrics
from easylm_mling.run.starting_model import load_config
from easylm_mling.run.train import train
from easylm_mling.run.turn_tokens import turn_tokens, warnings_of_turn_tokens
from easylm_mling.training.state import abstract_adapters, abstract_params

SETTINGS = [
    "data.sequence_length=32", "train.batch_size=8", "train.budget_tokens=1500", "train.accumulation_steps=2",
    "checkpoint.every_steps=2", "checkpoint.keep_last=9", "eval.every_steps=0", "eval.rows_per_source=1",
    "optimizer.learning_rate=0.01", "optimizer.warmup=2 steps", "train.digest_every_steps=1",
    "mesh.cpu_devices=0", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2",
    "lora.rank=4", "lora.dropout=0.1", "lora.projections=[q_proj, v_proj, down_proj]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(run_dir, base, *overrides) -> RunConfig:
    demo = read_yaml((ROOT / "configs" / "demo.yaml").read_bytes())
    file = run_dir.with_suffix(".json")
    file.write_text(json.dumps({name: tree for name, tree in demo.items() if name != "model"}))
    return load_config([str(file)], [*SETTINGS, f"run_dir={run_dir}", f"init_from={base}", *overrides])


def run(run_dir, base, *overrides) -> int:
    return train(config_of(run_dir, base, *overrides), Console(file=io.StringIO()))


def outcome(run_dir, config: RunConfig):
    lines = [
        {k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run_dir / "metrics.jsonl", "train")
    ]
    assert config.lora
    adapters = load_adapters(run_dir, abstract_adapters(config.model, config.lora, widest_mesh(config.model)))
    return lines, load_data_state(run_dir), jax.device_get(adapters)


def import_tiny(folder, **other):
    shape = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    files = save(transformers_model(4, 2, embedding=0.3, **shape | other), folder / "hf")
    shutil.copy(ROOT / "data" / "sample" / "tokenizer" / "tokenizer.model", files)
    import_hf(files, folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(base, a run on it that was never stopped)."""
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("lora")
    base = import_tiny(folder)
    assert run(folder / "run", base) == 0
    return base, folder / "run"


def test_it_learns_and_its_checkpoints_hold_adapters_only(whole):
    base, run_dir = whole
    config = config_of(run_dir, base)
    first, last = (read_metrics(run_dir / "metrics.jsonl", "eval")[i] for i in (0, -1))
    assert last["step"] == 6 and last["loss"] < first["loss"]
    info = load_info(run_dir)
    assert info["base"] == {"init_from": str(base), "step": 0, "digest": find_base(base).digest}
    stored = {p.name for p in (run_dir / "checkpoints" / "6").iterdir()}
    assert {"params", "training", "data", "info"} <= stored
    names = {name for name in info["digests"] if name.startswith("['params']")}
    assert len(names) == 6 and all(name.startswith("['params']['lora']['layers']") for name in names)
    assert sum("'frozen'" in name for name in info["digests"]) == 0
    # What every command loads is the base with the adapters added.
    model, mesh = config.model, widest_mesh(config.model)
    flat, before = (to_flat(jax.device_get(load_params(d, abstract_params(model, mesh)))) for d in (run_dir, base))
    changed = {path for path in flat if not np.array_equal(flat[path], before[path])}
    assert changed == {"layers.self_attn.q_proj", "layers.self_attn.v_proj", "layers.mlp.down_proj"}
    a, b = (to_flat(outcome(run_dir, config)[2])[f"lora.layers.q_proj.{factor}"] for factor in "ab")
    change = 32 / 4 * np.einsum("lnhr,lrd->lnhd", b, a)
    np.testing.assert_allclose(flat["layers.self_attn.q_proj"] - before["layers.self_attn.q_proj"], change, atol=1e-7)


@pytest.mark.parametrize("stops", [(3,), pytest.param((1, 4), marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_never_stopped(whole, tmp_path, stops):
    base, run_dir = whole
    for stop in stops:
        assert run(tmp_path / "run", base, f"train.stop_at_step={stop}") == 0
    # The base may move meanwhile.
    shutil.copytree(base, tmp_path / "moved")
    assert run(tmp_path / "run", tmp_path / "moved") == 0
    a, b = (outcome(d, config_of(d, base)) for d in (tmp_path / "run", run_dir))
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1:], b[1:])


def test_a_rewind_goes_on_with_the_same_adapters(whole, tmp_path):
    base, run_dir = whole
    shutil.copytree(run_dir, tmp_path / "run")
    # The replay check compares the bits of the steps that are done again.
    assert run(tmp_path / "run", base, "train.rewind=4") == 0
    assert outcome(tmp_path / "run", config_of(run_dir, base))[2].keys() == {"lora"}
    assert load_info(tmp_path / "run")["rewinds"] == 1


def test_another_base_is_refused_by_name(whole, tmp_path):
    base, run_dir = whole
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "other").mkdir()
    other = import_tiny(tmp_path / "other", kernels=0.06)
    for where, message in (
        (other, "belong to other parameters than those of step 0"),
        (tmp_path / "none", "which is not there"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            train(config_of(tmp_path / "run", base, f"init_from={where}"), Console(file=io.StringIO()))
        assert f"init_from={where}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="lora needs init_from"):
        train(replace(config_of(tmp_path / "fresh", base), init_from=None), Console(file=io.StringIO()))


def test_adapters_begin_where_others_ended(whole, tmp_path):
    base, run_dir = whole
    assert run(tmp_path / "run", base, f"lora.init_from={run_dir}", "train.stop_at_step=1") == 0
    first = read_metrics(tmp_path / "run" / "metrics.jsonl", "eval")[0]
    assert first["loss"] == pytest.approx(read_metrics(run_dir / "metrics.jsonl", "eval")[-1]["loss"], abs=1e-6)
    for change, message in (
        ("lora.rank=8", r"lora.init_from=.* was made with lora.rank=4"),
        ("lora.projections=[q_proj]", "was made with lora.projections="),
        (f"lora.init_from={base}", "holds no adapters.*import-hf ADAPTER DIR --base"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "wrong", base, f"lora.init_from={run_dir}", change)


def test_a_person_publishes_it(whole, tmp_path, capsys):
    base, run_dir = whole
    assert main(["export-hf", str(run_dir), str(tmp_path / "adapter"), "--adapter", "--verify"]) == 0
    assert main(["export-hf", str(run_dir), str(tmp_path / "merged"), "--verify", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "exported the adapter of step 6" in out and "12 tensors are bit for bit the checkpoint's" in out
    assert "down_proj: rounding error over the adapters' effect" in out and "are transformers' to" in out
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 32, 0.1)
    assert settings["base_model_name_or_path"] == str(base.parent / "hf")
    assert "LoRA of rank 4, alpha 32, dropout 0.1" in (tmp_path / "merged" / "README.md").read_text()
    said = "hello"
    for model in (run_dir, tmp_path / "merged"):
        assert main(["sample", str(model), "--prompt", said, "--max-new-tokens", "4", "--dtype", "float32"]) == 0
    texts = capsys.readouterr().out.split(f"[{said}]")[1:]
    assert len(texts) == 2 and texts[0].strip() == texts[1].strip()
    assert main(["summary", str(run_dir)]) == 0 and main(["report", str(run_dir)]) == 0
    assert "of adapters are trained" in (run_dir / "report.html").read_text()


def test_turn_tokens_that_the_base_never_learnt_are_named():
    data = load_mixer(["configs/tune/conversations.yaml"]).data
    catalog, tokenizer = build_catalog(data), Tokenizer(data.tokenizer)
    model = ModelConfig(4096, 8, 8, 1, 1, 1, 8, tie_word_embeddings=False, model_type="llama")
    ids = turn_tokens(catalog, tokenizer)
    assert {"<bos>", "<start_of_turn>", "<end_of_turn>"} <= {*ids.values()}
    end = next(i for i, name in ids.items() if name == "<end_of_turn>")
    rows = np.random.default_rng(0).normal(size=(2, 4096, 8)).astype(np.float32)
    frozen = {"embed_tokens": jax.numpy.asarray(rows[0]), "lm_head": jax.numpy.asarray(rows[1])}
    assert warnings_of_turn_tokens(frozen, model, catalog, tokenizer) == []
    for table in ("embed_tokens", "lm_head"):
        small = frozen | {table: frozen[table].at[end].multiply(0.01)}
        (line,) = warnings_of_turn_tokens(small, model, catalog, tokenizer)
        assert line.startswith(f"<end_of_turn> (id {end}) was not trained")
    # Without adapters the rows are trained.
    assert warnings_of_turn_tokens({}, model, catalog, tokenizer) == []
