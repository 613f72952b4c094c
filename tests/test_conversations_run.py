"""A run on conversations beside text: trained, stopped, resumed to the same losses, validated, and audited row by row."""

import io
import json

import numpy as np
import orjson
import pytest
from rich.console import Console
from test_data_conversations import rows_of

from easylm_mling.config import load
from easylm_mling.data import pool
from easylm_mling.data.tools.audit import audit
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.run.train import train

CONFIG = """
model: {{vocab_size: 4096, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
        num_key_value_heads: 1, head_dim: 8}}
data:
  tokenizer: data/sample/tokenizer/tokenizer.model
  sequence_length: 128
  block_bytes: 4000
  lanes: 4
  sources:
    chat: {{paths: {root}/chat.jsonl, weight: 3, holdout_fraction: 0.1, conversations: {{template: gemma}}}}
    text: {{paths: data/sample/llama2ko/en-*.jsonl.zst, weight: 1, holdout_fraction: 0.2}}
train: {{budget_tokens: 10240, batch_size: 8}}
mesh: {{fsdp: 8}}
checkpoint: {{every_steps: 4, keep_last: 1}}
eval: {{rows_per_source: 2}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [16_000_000, 0])
def test_a_run_on_conversations_goes_on_exactly_and_can_be_audited(tmp_path, monkeypatch, pooled):
    monkeypatch.setattr(pool, "POOLED_BYTES", pooled)
    (tmp_path / "chat.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in [*rows_of(150), {"messages": []}]))
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=tmp_path))

    def run(name, *overrides):
        config = load([str(tmp_path / "config.yaml")], [f"run_dir={tmp_path / name}", *overrides])
        assert train(config, Console(file=io.StringIO(), width=200)) == 0
        return [(m["step"], m["loss"]) for m in read_metrics(tmp_path / name / "metrics.jsonl", "train")]

    whole = run("whole")
    run("halves", "train.stop_at_step=5")
    assert run("halves") == whole and len(whole) == 10
    first, *_, last = read_metrics(tmp_path / "whole" / "metrics.jsonl", "eval")
    assert {*last["sources"]} == {"chat", "text"} and {*last["sources_stop_rate"]} == {"chat"}
    assert 0 < first["stop_rate"] < last["stop_rate"] == last["sources_stop_rate"]["chat"] < 1
    ledger = json.loads((tmp_path / "whole" / "ledger.json").read_text())
    assert ledger["sources"]["chat"]["padding"] > 0 and ledger["tokens"] + ledger["padding"] == 10240
    rows = audit(tmp_path / "whole", 7)  # compares its tokens with those of the batch
    chat = [row for row in rows if row["source"] == "chat"]
    assert len(rows) == 8 and chat
    for row in chat:
        assert all(d["first"] == 0 and d["begins"].startswith('{"messages"') for d in row["documents"])
        assert sum(d["tokens"] for d in row["documents"]) <= len(row["tokens"])
        np.testing.assert_array_equal(np.flatnonzero(row["tokens"] == 2).size, len(row["documents"]))
