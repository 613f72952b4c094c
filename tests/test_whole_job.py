"""The whole job by its commands, for models whose tokenizer is a tokenizer.json: raw text to an export that generates."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_corpus import documents
from hf_models import transformers_model
from processes import ROOT
from test_data_tokenizer_json import gemma, llama3, qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

from easylm_mling.cli.main import main
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.inference.generate import sample_text
from easylm_mling.monitoring.metrics import read_metrics

VOCABULARY = 832  # divides over the devices; the small tokenizers have fewer


def published(folder: Path, family: str, make_tokenizer) -> tuple[Path, Tokenizer]:
    """Write a tiny model as the hub has it: weights, config.json and a tokenizer trained here."""
    tokenizer = Tokenizer(str(make_tokenizer(folder)))
    rows = max(VOCABULARY, tokenizer.vocab_size)
    per_layer = {"vocab_size_per_layer_input": rows} if family == "gemma4_small" else {}
    model = transformers_model(family=family, vocab_size=rows, **per_layer)
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    model.save_pretrained(folder)
    return folder, tokenizer


def write_config(folder: Path) -> Path:
    """Write a config of two sources: one is small and dealt by documents, one streamed; 12 steps of 256 tokens."""
    for name, count in (("small", 60), ("large", 900)):
        lines = [json.dumps({"text": text}) for text in documents(count, seed=count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tree = {
        "run_dir": str(folder / "run"),
        "init_from": str(folder / "start"),
        "data": {
            "tokenizer": str(folder / "start/tokenizer"),
            "sequence_length": 32,
            "block_bytes": 20_000,
            "sources": {
                name: {"paths": str(folder / f"{name}.jsonl"), "weight": 1, "holdout_fraction": 0.1}
                for name in ("small", "large")
            },
        },
        "train": {"budget_tokens": 3000, "batch_size": 8, "compute_dtype": "float32"},
        "optimizer": {"learning_rate": 0.003, "warmup": "2 steps"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "checkpoint": {"every_steps": 4},
        "eval": {"every_steps": 6, "rows_per_source": 4},
    }
    (folder / "config.yaml").write_text(json.dumps(tree))
    return folder / "config.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, make_tokenizer", [("llama3", llama3), ("qwen3", qwen), ("gemma4", gemma), ("gemma4_small", gemma)]
)
def test_raw_text_to_a_published_model_that_generates(family, make_tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    source, tokenizer = published(tmp_path / "published", family, make_tokenizer)
    config, start, out = str(write_config(tmp_path)), str(tmp_path / "start"), tmp_path / "out"
    assert main(["import-hf", str(source), start]) == 0
    assert main(["data", "inspect", config]) == 0

    # Stopped half-way and resumed: the losses of a run that was never stopped.
    assert main(["train", config, "train.stop_at_step=5"]) == 0
    assert main(["train", config]) == 0
    assert main(["train", config, f"run_dir={tmp_path / 'whole'}"]) == 0
    losses = [
        {line["step"]: line["loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl", "train")}
        for run in ("run", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12 and losses[0][12] < losses[0][1]

    capsys.readouterr()
    assert main(["export-hf", str(tmp_path / "run"), str(out), "--dtype", "float32", "--verify"]) == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err and "verified: float32 logits" in printed.out
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()

    theirs, encoder = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    prompt = documents(1, seed=9)[0][:40]
    ids = encoder(prompt)["input_ids"]
    # What a text needs before it: Llama's tokenizer puts it there, Qwen's card says that a person must.
    assert (ids[0] == tokenizer.bos_id) == tokenizer.has_bos
    ids = torch.tensor([ids if tokenizer.has_bos else [tokenizer.bos_id, *ids]])
    made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    made = made[0, ids.shape[1] :].numpy()
    (ours,) = sample_text(str(out), [prompt], 12, temperature=0.0, dtype="float32")
    assert tokenizer.decode(made[np.cumsum(made == tokenizer.eos_id) == 0]) in ours
