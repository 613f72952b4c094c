"""A budget by epochs: every document exactly so often, in steps that are counted once, on any number of hosts."""

import io
import itertools
import re
from collections import Counter

import numpy as np
import orjson
import pytest
from data_corpus import assert_same, data_config, documents, tokenizer, tokenizer_path, write
from rich.console import Console

from easylm_mling.config import MixerConfig, SourceConfig, WeightingConfig, load, load_kept, load_mixer
from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.data import pool
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import PADDING, TOKENS, whole_state
from easylm_mling.data.tools.audit import audit
from easylm_mling.errors import ConfigError
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.run.epochs import count_steps
from easylm_mling.run.train import train

T = 64


def mixer(folder, epochs: int, lanes: int, sizes: list[int], batch_size: int = 0, chats: int = 0) -> MixerConfig:
    """Text sources of so many documents, and one of conversations if there are any."""
    rule = {"holdout_fraction": 0.0, "max_epochs": epochs, "when_used_up": "redistribute"}
    sources = {
        f"s{i}": SourceConfig((str(write(folder / f"s{i}", "jsonl", documents(n, i, f"s{i}_"))),), **rule)
        for i, n in enumerate(sizes)
    }
    if chats:
        rows = [{"instruction": f"count {n}", "output": f"c{n} " + "tree " * (n % 9)} for n in range(chats)]
        (folder / "chat.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))
        form = ConversationConfig(format="alpaca", template="komt")
        sources["chat"] = SourceConfig((str(folder / "chat.jsonl"),), conversations=form, **rule)
    weighting = WeightingConfig("tokens")
    data = data_config(sources, length=T, tokenizer=tokenizer_path(), data={"lanes": lanes, "weighting": weighting})
    return MixerConfig(data, batch_size or lanes, 0, epochs)


CASES = [
    ([40, 7], 0, 2, 4, 0),
    ([150], 0, 3, 4, 8),
    ([60, 90], 50, 1, 3, 0),
    ([5], 0, 2, 8, 0),  # fewer documents than lanes
]


@pytest.mark.parametrize("pooled", [16_000_000, 0, 12_000])
@pytest.mark.parametrize(("sizes", "chats", "epochs", "lanes", "batch_size"), CASES)
def test_every_document_is_read_exactly_so_often(
    tmp_path, monkeypatch, pooled, sizes, chats, epochs, lanes, batch_size
):
    """With all sources pooled, none, and some of them."""
    monkeypatch.setattr(pool, "POOLED_BYTES", pooled)
    config = mixer(tmp_path, epochs, lanes, sizes, batch_size, chats)
    catalog = build_catalog(config.data)
    steps = count_steps(config, catalog, tokenizer())
    with Loader(config, catalog, tokenizer()) as loader:
        items = list(itertools.islice(loader, steps))
    assert len(items) == steps and items[-1][0]["segment_ids"].any()
    batches = [batch for batch, _ in items]
    read = Counter()
    # A document that ends in one batch may begin in the one before: rows of a lane are one stream, so by lane.
    per_lane = config.batch_size // lanes
    for lane in range(lanes):
        rows = slice(lane * per_lane, (lane + 1) * per_lane)
        for source in range(len(config.data.sources)):
            chosen = [(b["tokens"][rows], b["segment_ids"][rows], b["source"][rows] == source) for b in batches]
            stream = [t[(s > 0) & of[:, None]] for t, s, of in chosen]
            ids = np.concatenate([np.zeros(0, np.int32), *stream])
            for text in np.split(ids, np.flatnonzero(ids == tokenizer().bos_id)):
                read.update(re.findall(r"(?<![a-z])(?:s\d_|c)\d+", tokenizer().decode(text[1:].tolist())))
    expected = {f"s{i}_{n}" for i, size in enumerate(sizes) for n in range(size)} | {f"c{n}" for n in range(chats)}
    assert set(read) == expected and set(read.values()) == {epochs}
    used = items[-1][1].lanes[..., [TOKENS, PADDING]].sum()
    assert used == steps * config.tokens_per_step

    # Two hosts, one of which goes on from the middle, give the same batches.
    half = lanes // 2
    hosts, middle = [range(half), range(half, lanes)], steps // 2
    parts = []
    for own in hosts:
        with Loader(config, catalog, tokenizer(), lanes=own) as loader:
            parts.append(list(itertools.islice(loader, steps)))
    for step, (batch, _) in enumerate(items):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[step][0][key] for p in parts]), value)
    if middle:
        state = whole_state([p[middle - 1][1] for p in parts])
        with Loader(config, catalog, tokenizer(), state) as loader:
            assert_same(list(itertools.islice(loader, steps - middle)), items[middle:])


RUN = """
model: {{vocab_size: 4096, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
        num_key_value_heads: 1, head_dim: 8}}
data:
  tokenizer: data/sample/tokenizer/tokenizer.model
  sequence_length: 128
  lanes: 4
  weighting: {{by: tokens}}
  sources:
    chat: {{paths: data/conversations/messages.jsonl, holdout_fraction: 0, conversations: {{template: gemma}}}}
    tasks: {{paths: data/conversations/alpaca.jsonl, holdout_fraction: 0, conversations: {{format: alpaca, template: aog}}}}
train: {{budget_epochs: 4, batch_size: 8}}
optimizer: {{final_fraction: 0.5, learning_rate: 0.01}}
mesh: {{fsdp: 1, data: 8}}
checkpoint: {{every_steps: 2, keep_last: 1}}
eval: {{rows_per_source: 1}}
"""


def run_by_epochs(folder, name, *overrides, **options):
    (folder / "config.yaml").write_text(RUN.format())
    config = load([str(folder / "config.yaml")], [f"run_dir={folder / name}", *overrides])
    assert train(config, Console(file=io.StringIO(), width=200), **options) == 0
    return read_metrics(folder / name / "metrics.jsonl", "train")


@pytest.mark.slow
def test_a_run_by_epochs_counts_its_steps_once(tmp_path):
    whole = run_by_epochs(tmp_path, "whole")
    kept = load_kept(tmp_path / "whole" / "config.yaml")
    assert kept.train.budget_epochs == 4 and kept.total_steps == len(whole) > 4
    # The schedule knows the end.
    assert whole[-1]["learning_rate"] < 0.0065 and whole[0]["learning_rate"] == pytest.approx(0.01, rel=1e-3)
    ledger = orjson.loads((tmp_path / "whole" / "ledger.json").read_bytes())
    assert ledger["tokens"] + ledger["padding"] == kept.train.counted_tokens == len(whole) * 1024
    assert ledger["sources"]["tasks"]["documents"] == 32
    last = audit(tmp_path / "whole", len(whole))
    assert len(last) == 8 and {bool(row["documents"]) for row in last} == {True, False}
    with pytest.raises(ConfigError, match="budget_epochs was counted for the data that this run began with"):
        run_by_epochs(tmp_path, "whole", accept_data_change=True)
    with pytest.raises(ConfigError, match="train.budget_epochs was 4, now 3"):
        run_by_epochs(tmp_path, "whole", "train.budget_epochs=3")


@pytest.mark.slow
def test_a_run_by_epochs_goes_on_exactly(tmp_path):
    whole = run_by_epochs(tmp_path, "whole")
    run_by_epochs(tmp_path, "halves", "train.stop_at_step=3")
    halves = run_by_epochs(tmp_path, "halves")
    assert [(m["step"], m["loss"]) for m in halves] == [(m["step"], m["loss"]) for m in whole]


def test_what_epochs_do_not_go_with_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(RUN.format())
    for overrides, message in (
        (["train.budget_tokens=5"], "give one of budget_tokens"),
        (["train.budget_epochs=0"], "give one of budget_tokens"),
        (["train.budget_epochs=-1"], "must not be negative"),
        (["data.weighting.by=unimax"], "does not; say data.weighting.by=tokens"),
        (["data.sources.chat.max_epochs=5"], "remove max_epochs"),
    ):
        for loading in (lambda o: load([str(tmp_path / "config.yaml")], ["run_dir=x", *o]), None):
            with pytest.raises(ConfigError, match=message):
                loading(overrides) if loading else load_mixer([str(tmp_path / "config.yaml")], overrides)
            if "budget" in overrides[0]:
                break  # without a budget a mixer reads everything once


def test_data_that_is_too_large_to_be_counted_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("easylm_mling.run.epochs._MOST_TOKENS", 100)
    config = mixer(tmp_path, 2, 2, [40])
    with pytest.raises(ConfigError, match=r"about .* tokens, which would take hours .* give train.budget_tokens=\d+"):
        count_steps(config, build_catalog(config.data), tokenizer())
