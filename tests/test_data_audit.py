"""A run's books: what its ledger says, what an audit finds, what an inspection foretold, and a change of its data."""

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_corpus import documents, tokenizer_path, write
from rich.console import Console

from easylm_mling.checkpoint.reading import load_data_state, load_info
from easylm_mling.cli.main import main
from easylm_mling.config import load
from easylm_mling.data import pool
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import COUNTERS, DOCUMENTS, EPOCH, OFFSET, PADDING, ROWS, TOKENS
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.tools.audit import audit
from easylm_mling.errors import ConfigError
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.run.summary import print_summary
from easylm_mling.run.train import train

CONFIG = """
model: {{vocab_size: 1200, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
        num_key_value_heads: 1, head_dim: 8}}
data:
  tokenizer: {tokenizer}
  sequence_length: 32
  block_bytes: 2000
  lanes: 4
  sources:
    web: {{paths: {root}/web.jsonl, weight: 2}}
    pair:
      weight: 2
      sources:
        ko: {{paths: {root}/ko.jsonl.gz, weight: 1}}
        en: {{paths: {root}/en.parquet, weight: 3, max_epochs: 1, when_used_up: redistribute}}
    many: {{paths: "{root}/many/{{language}}/data.arrow", weight: 1, language_temperature: 0.5}}
train: {{budget_tokens: 5000, batch_size: 8}}
mesh: {{fsdp: 8}}
checkpoint: {{every_steps: 4, keep_last: 1}}
eval: {{rows_per_source: 2}}
"""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A folder with the corpora and config.yaml."""
    root = tmp_path_factory.mktemp("corpora")
    write(root / "web", "jsonl", documents(300, prefix="w"))
    (root / "web.jsonl").write_text((root / "web.jsonl").read_text() + "no json\n")
    write(root / "ko", "jsonl.gz", documents(60, prefix="k"))
    write(root / "en", "parquet", documents(20, prefix="e"))
    for language, count in (("xx", 90), ("yy", 7)):
        write(root / "many" / language / "data", "arrow", documents(count, prefix=language), rows=3)
    (root / "config.yaml").write_text(CONFIG.format(root=root, tokenizer=tokenizer_path()))
    return root


def run(corpora, run_dir, *overrides, **options) -> str:
    console = Console(file=io.StringIO(), width=200)
    assert train(load([str(corpora / "config.yaml")], [f"run_dir={run_dir}", *overrides]), console, **options) == 0
    return console.file.getvalue()


@pytest.fixture(scope="module")
def undisturbed(corpora, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    output = run(corpora, run_dir)
    return run_dir, output


def batches(run_dir, steps):
    """The run's batches, by a loader from its start."""
    config = load([str(Path(run_dir) / "config.yaml")])
    with Loader(config.mixer, Catalog.load(run_dir / "catalog.json"), Tokenizer(config.data.tokenizer)) as loader:
        return [next(loader) for _ in range(steps)]


def test_the_ledger_file_is_what_the_batches_held(undisturbed):
    run_dir, _ = undisturbed
    ledger = json.loads((run_dir / "ledger.json").read_text())
    drawn = batches(run_dir, 20)
    assert ledger["step"] == 20 and ledger["rows"] == 160
    assert ledger["tokens"] == sum(np.count_nonzero(b["segment_ids"]) for b, _ in drawn)
    assert list(ledger["sources"]) == ["web", "pair/ko", "pair/en", "many"]
    for i, source in enumerate(ledger["sources"].values()):
        of = [(b["tokens"][b["source"] == i], b["segment_ids"][b["source"] == i]) for b, _ in drawn]
        assert source["rows"] == sum(len(t) for t, _ in of)
        assert source["padding"] == sum(np.count_nonzero(s == 0) for _, s in of)
        assert source["tokens"] == source["rows"] * 32 - source["padding"]
        assert source["documents"] == sum(np.count_nonzero(t == 2) for t, _ in of)
    assert ledger["sources"]["pair/en"]["epochs"] == pytest.approx(1, abs=0.15)
    assert [s["wanted"] for s in ledger["sources"].values()] == [0.4, 0.1, 0.3, 0.2]
    languages = ledger["languages"]["many"]
    assert sum(x["tokens"] for x in languages.values()) == ledger["sources"]["many"]["tokens"]
    assert sum(x["documents"] for x in languages.values()) == ledger["sources"]["many"]["documents"]


def test_languages_are_counted_token_by_token(undisturbed):
    """Against the audit of every batch, which finds the language of every token by reading the files again."""
    run_dir, _ = undisturbed
    counted, begun = Counter(), Counter()
    for step in range(1, 21):
        for row in audit(run_dir, step):
            for d in row["documents"]:
                counted[d["language"]] += d["tokens"] * (row["source"] == "many")
                begun[d["language"]] += (row["source"] == "many") * (d["first"] == 0)
    languages = json.loads((run_dir / "ledger.json").read_text())["languages"]["many"]
    assert {k: v["tokens"] for k, v in languages.items()} == {k: counted[k] for k in ("xx", "yy")}
    assert {k: v["documents"] for k, v in languages.items()} == {k: begun[k] for k in ("xx", "yy")}


def test_metrics_tell_the_sources_every_step_and_the_languages_at_checkpoints(undisturbed):
    run_dir, output = undisturbed
    lines = read_metrics(run_dir / "metrics.jsonl", "train")
    tokens = [sum(s["tokens"] + s["padding"] for s in line["ledger"].values()) for line in lines]
    assert tokens == [256 * n for n in range(1, 21)]
    assert [x["step"] for x in read_metrics(run_dir / "metrics.jsonl", "languages")] == [4, 8, 12, 16, 20]
    news = [text for x in read_metrics(run_dir / "metrics.jsonl", "news") for text in x["news"]]
    assert any("pair/en is used up in all its lanes" in text for text in news)
    assert all(text in output for text in news)


@pytest.mark.parametrize("stops", [pytest.param((3, 11), marks=pytest.mark.slow), (16,)])
def test_a_resumed_run_has_the_same_books(corpora, undisturbed, tmp_path, stops):
    for stop in stops:
        run(corpora, tmp_path / "run", f"train.stop_at_step={stop}")
    run(corpora, tmp_path / "run")
    assert (tmp_path / "run/ledger.json").read_text() == (undisturbed[0] / "ledger.json").read_text()
    for kind in ("train", "languages", "news"):
        a, b = (read_metrics(d / "metrics.jsonl", kind) for d in (tmp_path / "run", undisturbed[0]))
        key = "ledger" if kind == "train" else kind
        a, b = ({line["step"]: line[key] for line in lines} for lines in (a, b))
        assert b.items() <= a.items()


@pytest.mark.parametrize("step", [1, 4, 5, 11, 20])
def test_an_audit_reproduces_a_batch_and_names_its_documents(undisturbed, step):
    run_dir, _ = undisturbed
    batch, _ = batches(run_dir, step)[-1]
    rows = audit(run_dir, step)
    np.testing.assert_array_equal([row["tokens"] for row in rows], batch["tokens"])
    names = ["web", "pair/ko", "pair/en", "many"]
    for row in rows:
        assert names.index(row["source"]) == batch["source"][row["row"]] and row["lane"] == row["row"] // 2
        for d in row["documents"]:
            assert d["begins"][0] == {"web": "w", "pair/ko": "k", "pair/en": "e"}.get(row["source"], d["language"][:1])
            assert Path(d["file"]).is_file()
    (one,) = audit(run_dir, step, row=3)
    np.testing.assert_array_equal(one.pop("tokens"), rows[3].pop("tokens"))
    assert one == rows[3]


def test_an_audit_reads_few_batches_again(undisturbed, monkeypatch):
    drawn = []
    inner = Loader.__next__
    monkeypatch.setattr(Loader, "__next__", lambda self: drawn.append(1) or inner(self))
    audit(undisturbed[0], 19)
    assert len(drawn) == 3
    assert sorted(p.name for p in (undisturbed[0] / "data_states").iterdir()) == [
        f"{n}.npz" for n in (12, 16, 20, 4, 8)
    ]


def test_states_of_steps_that_a_resumed_run_does_again_are_forgotten(corpora, undisturbed, tmp_path):
    run(corpora, tmp_path / "run", "train.stop_at_step=8")
    states = tmp_path / "run/data_states"
    shutil.copy(states / "4.npz", states / "12.npz")  # as if the checkpoint of step 12 had never become whole
    run(corpora, tmp_path / "run", "checkpoint.every_steps=20")
    assert sorted(p.name for p in states.iterdir()) == ["20.npz", "4.npz", "8.npz"]
    for a, b in zip(audit(tmp_path / "run", 13), audit(undisturbed[0], 13), strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_an_audit_of_what_is_not_there_is_one_line(corpora, undisturbed, tmp_path, capsys):
    for arguments, message in (
        ([str(undisturbed[0]), "--step", "21"], "--step 21: the checkpoints of"),
        ([str(undisturbed[0]), "--step", "2", "--row", "8"], "--row 8: a batch has rows 0 to 7"),
        ([str(tmp_path), "--step", "2"], "not a run's directory"),
    ):
        assert main(["data", "audit", *arguments]) == 2
        assert message in capsys.readouterr().err
    shutil.copytree(undisturbed[0], tmp_path / "run")
    (tmp_path / "run/data_states/4.npz").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="4.npz: not a readable data state"):
        audit(tmp_path / "run", 5)


def test_the_command_line_prints_an_audit_and_an_inspection(corpora, undisturbed, tmp_path, capsys):
    assert main(["data", "audit", str(undisturbed[0]), "--step", "2", "--row", "0", "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(row["tokens"]) == 32 and sum(d["tokens"] for d in row["documents"]) == 32
    assert main(["data", "audit", str(undisturbed[0]), "--step", "2"]) == 0
    assert sum(line.startswith("row ") for line in capsys.readouterr().out.splitlines()) == 8
    config = [str(corpora / "config.yaml"), "run_dir=unused"]
    assert main(["data", "inspect", *config, "--json"]) == 0
    inspection = json.loads(capsys.readouterr().out)
    assert list(inspection["sources"]) == ["web", "pair/ko", "pair/en", "many"]
    assert main(["data", "inspect", *config]) == 0
    output = capsys.readouterr().out
    assert "used up after" in output and "the most repeated first" in output
    assert not os.path.exists("unused")


def test_an_inspection_foretells_the_run(corpora, undisturbed, capsys):
    main(["data", "inspect", str(corpora / "config.yaml"), "run_dir=unused", "--json"])
    inspection = json.loads(capsys.readouterr().out)["sources"]
    ledger = json.loads((undisturbed[0] / "ledger.json").read_text())
    for name, source in ledger["sources"].items():
        assert inspection[name]["taken"] == pytest.approx(source["tokens"], rel=0.1, abs=64), name
        assert inspection[name]["epochs"] == pytest.approx(source["epochs"], rel=0.1, abs=0.1)
    for language, x in ledger["languages"]["many"].items():
        # Shares of languages are met over an epoch; this run read part of one.
        assert inspection["many"]["languages"][language]["taken"] == pytest.approx(x["tokens"], rel=0.5)


def test_a_picture_of_the_shares(corpora, tmp_path):
    arguments = [
        "data",
        "inspect",
        str(corpora / "config.yaml"),
        "run_dir=unused",
        "--png",
        str(tmp_path / "shares.png"),
    ]
    assert main(arguments) == 0
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_says_what_the_ledger_says(undisturbed):
    console = Console(file=io.StringIO(), width=200)
    print_summary(str(undisturbed[0]), console)
    ledger = json.loads((undisturbed[0] / "ledger.json").read_text())
    assert all(f"{s['tokens']:,}" in console.file.getvalue() for s in ledger["sources"].values())


STAGES = "data.stages=[{{from_tokens: {}, weights: {{web: {}}}}}]"


@pytest.mark.slow
def test_stages_may_change_on_resume_but_not_in_the_past(corpora, undisturbed, tmp_path):
    run(corpora, tmp_path / "run", "train.stop_at_step=10")
    run(corpora, tmp_path / "run", STAGES.format(14 * 256, 0), "train.stop_at_step=16")
    with pytest.raises(ConfigError, match="data.stages: those that began before 4096 tokens"):
        run(corpora, tmp_path / "run")
    with pytest.raises(ConfigError, match="data.stages"):
        run(corpora, tmp_path / "run", STAGES.format(12 * 256, 0))
    run(corpora, tmp_path / "run", STAGES.format(14 * 256, 0))
    for step in range(1, 21):
        web = [row["row"] for row in audit(tmp_path / "run", step) if row["source"] == "web"]
        assert bool(web) == (step <= 14)
    ours, theirs = (load_data_state(d, 20)["lanes"] for d in (tmp_path / "run", undisturbed[0]))
    assert ours[:, 0, TOKENS].sum() < theirs[:, 0, TOKENS].sum()
    assert load_info(tmp_path / "run")["config"]["data"]["stages"][0]["from_tokens"] == 14 * 256


@pytest.mark.slow
def test_a_run_may_end_with_its_data(corpora, tmp_path):
    rule = ["data.sources.pair.sources.ko.max_epochs=1", "data.sources.pair.sources.ko.when_used_up=stop"]
    rule += ["data.lanes=1", "data.block_bytes=1000", "checkpoint.every_steps=100", "data.sources.pair.weight=20"]
    output = run(corpora, tmp_path / "run", *rule, "train.budget_tokens=100000")
    state = load_data_state(tmp_path / "run")["lanes"]
    steps = state[..., ROWS].sum() // 8
    assert f"the data ended at step {steps} of 391: data.sources.pair/ko is used up (max_epochs=1)" in output
    # All 60 documents but those behind the last whole batch.
    assert 30 < state[:, 1, DOCUMENTS].sum() <= 60
    assert [x["step"] for x in read_metrics(tmp_path / "run/metrics.jsonl", "eval")] == [0, steps]
    assert f"the data ended at step {steps}" in run(corpora, tmp_path / "run", *rule, "train.budget_tokens=100000")


@pytest.mark.slow
def test_a_change_of_the_data_is_refused_and_can_be_accepted(corpora, tmp_path):
    copy = tmp_path / "corpora"
    shutil.copytree(corpora, copy)
    (copy / "config.yaml").write_text(CONFIG.format(root=copy, tokenizer=tokenizer_path()))
    run_dir = tmp_path / "run"
    run(copy, run_dir, "train.stop_at_step=10")
    before = load_data_state(run_dir)
    write(copy / "ko", "jsonl.gz", documents(80, prefix="n"))
    write(copy / "more", "jsonl", documents(50, prefix="m"))
    more = [f"data.sources.more.paths={copy}/more.jsonl", "data.sources.more.weight=1"]
    with pytest.raises(ConfigError, match="ko.jsonl.gz is changed"):
        run(copy, run_dir)
    with pytest.raises(ConfigError, match="data.sources.more.*or go on with --accept-data-change"):
        run(copy, run_dir, *more)
    with pytest.raises(ConfigError, match="train.seed was 0, now 1"):
        run(copy, run_dir, "train.seed=1", accept_data_change=True)
    output = run(copy, run_dir, *more, "train.stop_at_step=12", accept_data_change=True)
    assert "pair/ko has changed and begins at its first epoch" in output and "more is new" in output
    # From here on the run is an ordinary one again.
    run(copy, run_dir, *more)
    assert (run_dir / "config-to-step-10.yaml").exists() and (run_dir / "catalog-to-step-10.json").exists()
    after = load_data_state(run_dir, 20)["lanes"]
    assert after.shape == (4, 5, len(COUNTERS)) and after[..., ROWS].sum() == 160
    assert (after[:, :4, DOCUMENTS] >= before["lanes"][..., DOCUMENTS]).all()
    assert after[..., TOKENS].sum() + after[..., PADDING].sum() == 160 * 32
    drawn = [row for step in range(11, 21) for row in audit(run_dir, step)]
    share = Counter(row["source"] for row in drawn)
    assert share["more"] == pytest.approx(80 / 6, abs=4)
    words = {d["begins"][0] for row in drawn if row["source"] == "pair/ko" for d in row["documents"]}
    assert words == {"n"}
    with pytest.raises(ConfigError, match="step 9 was drawn before the data was changed"):
        audit(run_dir, 9)


@pytest.mark.slow
def test_a_source_that_did_not_change_goes_on_where_it_was(corpora, undisturbed, tmp_path):
    run(corpora, tmp_path / "run", "train.stop_at_step=10")
    before = load_data_state(tmp_path / "run")["lanes"]
    run(
        corpora,
        tmp_path / "run",
        "data.sources.many.sample_fraction=0.8",
        "train.stop_at_step=11",
        accept_data_change=True,
    )
    (first, *_) = [row for row in audit(tmp_path / "run", 11) if row["source"] == "web"]
    lane = first["lane"]
    assert first["documents"][0]["first"] == before[lane, 0, OFFSET]
    assert first["documents"][0]["epoch"] == before[lane, 0, EPOCH]


def test_another_batch_size_is_refused_with_the_reason(corpora, tmp_path):
    run(corpora, tmp_path / "run", "train.stop_at_step=1")
    with pytest.raises(
        ConfigError, match=r"train.batch_size was 8, now 16\. .* go on with --change train.batch_size=16"
    ):
        run(corpora, tmp_path / "run", "train.batch_size=16")


def test_data_that_ends_before_the_first_step_is_an_error(corpora, tmp_path):
    tree = yaml.safe_load((corpora / "config.yaml").read_text())
    tree["data"]["sources"] = {"en": tree["data"]["sources"]["pair"]["sources"]["en"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="the data ends before the first step: every source is used up in lane"):
        run(tmp_path, tmp_path / "run", "train.batch_size=64")


def test_an_audit_of_a_source_that_is_not_pooled(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "POOLED_BYTES", 4000)
    run(corpora, tmp_path / "run", "train.stop_at_step=9")
    rows = audit(tmp_path / "run", 7)
    assert len({row["source"] for row in rows}) > 2 and all(row["documents"] for row in rows)
