"""The recipes in configs/tune: in their own shape on the sample conversations, each row is read, and answers are trained on."""

import io
import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from easylm_mling.config import RunConfig, from_tree, load
from easylm_mling.config.loading import _merged
from easylm_mling.config.yaml12 import write_yaml
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.loader import Loader
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.monitoring.task_table import before_and_after
from easylm_mling.run.epochs import count_steps
from easylm_mling.run.starting_model import load_config
from easylm_mling.run.train import train

SMALL = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip
ONE_DEVICE = ("mesh.cpu_devices=0", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")


@pytest.mark.parametrize("name", ["aog", "komt", "ko-gemma"])
def test_a_recipe_reads_its_conversations_whole_and_trains_on_answers(name):
    tree = _merged([f"configs/tune/{name}.yaml"], ["train.batch_size=1", "train.accumulation_steps=1"])
    for source in tree["data"]["sources"].values():
        source["holdout_fraction"] = 0.0
    config = from_tree(RunConfig, tree | {"model": SMALL})
    assert config.lora and config.lora.alpha == 32
    tokenizer, catalog = Tokenizer(config.data.tokenizer), build_catalog(config.data)
    steps = count_steps(config.mixer, catalog, tokenizer)
    with Loader(config.mixer, catalog, tokenizer) as loader:
        batches = [next(loader) for _ in range(steps)]
    files = {path for source in config.data.sources.values() for path in source.paths}
    rows = sum(len(Path(file).read_bytes().splitlines()) for file in files)
    documents = sum(int((b["positions"] == 0).sum() - (b["segment_ids"] == 0).sum()) for b, _ in batches)
    assert documents == rows * config.train.budget_epochs
    targets = sum(int(b["loss_mask"].sum()) for b, _ in batches)
    tokens = sum(int((b["segment_ids"] > 0).sum()) for b, _ in batches)
    assert 0.05 < targets / tokens < 0.8


@pytest.fixture(scope="module")
def base(tmp_path_factory, one_device):
    """A tiny model that has seen a little text: adapters need something to stand beside."""
    folder = tmp_path_factory.mktemp("base")
    shape = [f"model.{name}={value}" for name, value in {**SMALL, "max_position_embeddings": 4096}.items()]
    few = [
        "data.sequence_length=256",
        "train.budget_tokens=160000",
        "train.batch_size=16",
        "train.accumulation_steps=1",
    ]
    settings = [*shape, *few, *ONE_DEVICE, f"run_dir={folder / 'run'}", "eval.every_steps=0", "eval.rows_per_source=1"]
    assert train(load(["configs/demo.yaml"], settings), Console(file=io.StringIO())) == 0
    return folder / "run"


def joined(rows: list[dict]) -> dict:
    """One conversation of several: a row of the same format as theirs."""
    first, *_, last = [*rows, rows[-1]]
    if "messages" in first:
        turns = [m for row in rows for m in row["messages"] if m["role"] != "system"]
        return {"messages": [*(m for m in first["messages"] if m["role"] == "system"), *turns]}
    if "text" in first:
        return {"text": "\n".join(row["text"] for row in rows)}
    return {**last, "history": [[row["instruction"], row["output"]] for row in rows[:-1]]}


def write_many(source: dict, file: Path) -> dict:
    """Write 400 conversations of many lengths, each of 1 to 12 of the source's own, and return the source that reads them."""
    paths = source["paths"] if isinstance(source["paths"], list) else [source["paths"]]
    rows = [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    many = [joined(rng.choices(rows, k=rng.randint(1, 12))) for _ in range(400)]
    file.write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    return source | {"paths": str(file), "holdout_fraction": 0.05}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aog", "komt", "ko-gemma"])
def test_a_recipe_in_its_own_shape_teaches_to_answer_and_to_stop(base, tmp_path, name):
    """Its forms and adapters, in rows of 4,096; few rows a step, and a learning rate for a tiny model. Small tasks are scored, too."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    tree = _merged([f"configs/tune/{name}.yaml"], [])
    sources = tree["data"]["sources"]
    tree["data"]["sources"] = {key: write_many(source, tmp_path / f"{key}.jsonl") for key, source in sources.items()}
    tree["data"]["sequence_length"] = 4096
    tree["train"] |= {"budget_epochs": 0, "budget_tokens": 160_000, "batch_size": 2, "accumulation_steps": 1}
    tree["optimizer"] |= {"learning_rate": 0.02, "warmup": "2 steps"}
    tree |= {"run_dir": str(tmp_path / "run"), "init_from": str(base)}
    file = tmp_path / "recipe.yaml"
    file.write_text(write_yaml(tree))
    few = ("checkpoint.every_steps=1000", "train.compute_dtype=float32", "eval.rows_per_source=4", "eval.suite=quick")
    assert train(load_config([str(file)], [*ONE_DEVICE, *few]), Console(file=io.StringIO())) == 0
    first, *_, last = read_metrics(tmp_path / "run" / "metrics.jsonl", "eval")
    consumed = json.loads((tmp_path / "run" / "ledger.json").read_text())
    full = consumed["tokens"] / (consumed["tokens"] + consumed["padding"])
    print(
        f"\n{name}: loss on held-out answers {first['loss']:.3f} -> {last['loss']:.3f}, stop rate "
        f"{first['stop_rate']:.2%} -> {last['stop_rate']:.2%}, rows of 4,096 {full:.2%} full"
    )
    heads, rows = before_and_after(tmp_path / "run" / "metrics.jsonl")
    print(*map("  ".join, [heads, *rows]), sep="\n")
    assert [row[0] for row in rows] == ["sentence ends", "counting on"]
    assert last["loss"] < first["loss"] - 0.3
    assert last["stop_rate"] > 1.1 * first["stop_rate"]
    assert full > 0.97
