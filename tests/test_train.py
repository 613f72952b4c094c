"""The whole job on the sample corpora: resume to the bit, refuse what is wrong, lose nothing to a signal."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from processes import ROOT, SMALL
from rich.console import Console

from easylm_mling.checkpoint.parameters import load_params
from easylm_mling.checkpoint.reading import load_data_state, load_info, packed
from easylm_mling.cli.main import main
from easylm_mling.config import load
from easylm_mling.data.tools.audit import audit
from easylm_mling.errors import ConfigError, NoUsableCheckpoint, TrainingStopped
from easylm_mling.hf.exporting import export_hf
from easylm_mling.model.sharding import make_mesh
from easylm_mling.monitoring.metrics import TIMINGS, read_metrics
from easylm_mling.monitoring.report.page import write_report
from easylm_mling.run.changes import past_changes
from easylm_mling.run.train import train
from easylm_mling.training.state import abstract_params

TINY = [*SMALL, "mesh.cpu_devices=0"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def tiny(run_dir, *overrides):
    return load(["configs/demo.yaml"], [*TINY, f"run_dir={run_dir}", *overrides])


def run(run_dir, *overrides) -> int:
    return train(tiny(run_dir, *overrides), Console(file=io.StringIO()))


def outcome(run_dir):
    """Everything that must not depend on how often a run was stopped."""
    lines = [
        {k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run_dir / "metrics.jsonl", "train")
    ]
    config = tiny(run_dir)
    params = load_params(run_dir, abstract_params(config.model, make_mesh(config.mesh)))
    return lines, load_data_state(run_dir), jax.device_get(params)


def assert_same_bits(a, b):
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1:], b[1:])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    os.chdir(ROOT)
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(run_dir) == 0
    return run_dir


def test_a_run_meets_its_budget_and_learns(undisturbed):
    lines, data, _ = outcome(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["tokens"] == 2560 == data["lanes"][..., 6].sum() == data["languages"][:, 0].sum()
    first, last = (read_metrics(undisturbed / "metrics.jsonl", "eval")[i] for i in (0, -1))
    assert (first["step"], last["step"]) == (0, 10)
    assert last["loss"] < first["loss"] and last["sources"].keys() == tiny(undisturbed).data.sources.keys()
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["10", "8"]


@pytest.mark.parametrize("stops", [(1,), *(pytest.param(s, marks=pytest.mark.slow) for s in [(4, 5), (9,)])])
def test_stopped_and_resumed_is_never_stopped(undisturbed, tmp_path, stops):
    for stop in stops:
        assert run(tmp_path / "run", f"train.stop_at_step={stop}") == 0
    assert run(tmp_path / "run") == 0
    assert_same_bits(outcome(tmp_path / "run"), outcome(undisturbed))


@pytest.mark.slow
def test_resuming_on_another_mesh_goes_on_with_the_same_data(undisturbed, tmp_path):
    run(tmp_path / "run", "train.stop_at_step=5")
    run(tmp_path / "run", "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2", "train.accumulation_steps=1")
    (lines, data, _), (expected, expected_data, _) = outcome(tmp_path / "run"), outcome(undisturbed)
    assert_same_bits(([], data), ([], expected_data))
    np.testing.assert_allclose([x["loss"] for x in lines], [x["loss"] for x in expected], rtol=1e-4)


def test_a_checkpoint_keeps_the_order_of_the_sources(undisturbed):
    """The data state counts sources by their place, so a stored config that sorts them would be of another run."""
    names = list(tiny(undisturbed).data.sources)
    assert names != sorted(names)
    assert list(load_info(undisturbed)["config"]["data"]["sources"]) == names


def test_a_checkpoint_from_before_there_was_a_setting_goes_on(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    stored = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name)) / "info" / "_strings.json"
    info = json.loads(json.loads(stored.read_text())["json"])
    for source in info["config"]["data"]["sources"].values():
        del source["when_used_up"]
    stored.write_text(json.dumps(packed(info)))
    assert run(tmp_path / "run") == 0


def test_init_from_takes_parameters_but_not_the_past(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "base")
    run(tmp_path / "next", f"init_from={tmp_path}/base", "train.stop_at_step=1")
    shutil.rmtree(tmp_path / "base")
    # The run goes on from its own checkpoint.
    run(tmp_path / "next", f"init_from={tmp_path}/base", "train.stop_at_step=2")
    first = read_metrics(tmp_path / "next" / "metrics.jsonl", "eval")[0]
    assert first["step"] == 0
    assert first["sources"] == read_metrics(undisturbed / "metrics.jsonl", "eval")[-1]["sources"]
    with pytest.raises(
        ConfigError, match=r"parameter \['embed_tokens'\] has shape \(4096, 32\), the model needs \(4096, 64\)"
    ):
        run(tmp_path / "other", f"init_from={undisturbed}", "model.hidden_size=64")


def test_losses_that_are_not_finite_stop_the_run_and_spare_the_checkpoints(tmp_path, monkeypatch):
    config = tiny(
        tmp_path / "run",
        "optimizer.learning_rate=1e30",
        "train.max_skipped_in_a_row=3",
        "optimizer.warmup=0 steps",
        "checkpoint.every_steps=2",
    )
    with pytest.raises(TrainingStopped, match=r"not finite in step \d+, the last of 3 in a row"):
        train(config, Console(file=io.StringIO()))
    params = load_params(tmp_path / "run", abstract_params(config.model, make_mesh(config.mesh)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(params)))


def start(run_dir, *overrides):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "easylm_mling",
        "train",
        "configs/demo.yaml",
        *TINY,
        f"run_dir={run_dir}",
        *overrides,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(process, run_dir, step):
    while process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and any(
            x["step"] >= step for x in read_metrics(run_dir / "metrics.jsonl", "train")
        ):
            return
        time.sleep(0.01)
    raise AssertionError(process.stdout.read())


@pytest.mark.parametrize(
    "how, code", [(signal.SIGTERM, 42), pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_real_signal_loses_nothing(undisturbed, tmp_path, how, code):
    process = start(tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(how)
    output, _ = process.communicate(timeout=120)
    # The run may have been done before the signal arrived; then there was nothing to lose.
    assert process.returncode in (code, 0), output
    assert run(tmp_path / "run") == 0
    assert_same_bits(outcome(tmp_path / "run"), outcome(undisturbed))


REFUSED = [
    (["train.batchsize=8"], "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
    (["train.batch_size=6", "train.accumulation_steps=1"], "6 rows do not divide over the 4 shards"),
    (["data.sources.skypile.weight=-1"], "data.sources.skypile.weight=-1.0"),
    (["data.sources.skypile.paths=nowhere/*.jsonl"], "data.sources.skypile.paths"),
    (["data.tokenizer=nowhere.model"], "nowhere.model"),
    (["model.vocab_size=1000"], "4096"),
    (["data.sources.cc100-ja.text_column=body"], "body"),
    (["init_from=nowhere"], "nowhere: no checkpoint here"),
    (["mesh.tensor=3"], "does not multiply to the 8 devices"),
]


@pytest.mark.parametrize("overrides, message", REFUSED)
def test_a_mistake_is_one_line_and_writes_no_checkpoint(tmp_path, capsys, overrides, message):
    run_dir = tmp_path / "run"
    assert main(["train", "configs/demo.yaml", *TINY, f"run_dir={run_dir}", *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not list(run_dir.glob("checkpoints/*"))


def test_the_directory_of_another_run_is_refused(undisturbed, tmp_path):
    with pytest.raises(ConfigError, match="belongs to a run with another config: train.seed was 0, now 1"):
        run(undisturbed, "train.seed=1")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run(tmp_path / "letters")
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["dear.txt"]


def test_a_corpus_that_changed_under_a_run_is_refused(tmp_path):
    corpus = tmp_path / "zh.jsonl"
    rows = (ROOT / "data/sample/skypile/data").glob("*.jsonl")
    corpus.write_text("".join(p.read_text(encoding="utf-8") for p in rows), encoding="utf-8")
    paths = f"data.sources.skypile.paths={corpus}"
    run(tmp_path / "run", paths, "train.stop_at_step=2")
    with open(corpus, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(ConfigError, match="zh.jsonl"):
        run(tmp_path / "run", paths)


def test_checkpoints_that_are_gone_do_not_begin_the_run_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(NoUsableCheckpoint, match="holds no checkpoint, but this run saved one at step 10"):
        run(tmp_path / "run")
    # The record of events may be gone with them, and an attempt that fails begins a new one.
    (tmp_path / "run/events.jsonl").unlink()
    for _ in range(2):
        with pytest.raises(NoUsableCheckpoint, match="holds no checkpoint, but this run saved one at step 8"):
            run(tmp_path / "run")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_neither_file_of_the_runs_tokenizer_may_change(undisturbed, tmp_path, name):
    """Training reads one of them, and an export ships both."""
    shutil.copytree(undisturbed, tmp_path / "run")
    file = tmp_path / "run/tokenizer" / name
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(ConfigError, match="damaged, or not the tokenizer that the checkpoint was trained with"):
        export_hf(tmp_path / "run", tmp_path / "hf")
    if name == "tokenizer.json":
        with pytest.raises(ConfigError, match="run/tokenizer: holds another tokenizer file than when the checkpoint"):
            run(tmp_path / "run")


@pytest.mark.slow
def test_a_directory_in_which_no_step_was_done_may_be_begun_anew(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError):
        run(tmp_path / "run", f"init_from={tmp_path / 'empty'}")
    assert run(tmp_path / "run", "train.seed=3") == 0
    assert load([str(tmp_path / "run/config.yaml")]).train.seed == 3
    with pytest.raises(ConfigError, match="another config"):
        run(tmp_path / "run", "train.seed=4")


def test_a_damaged_config_of_the_run_is_named_as_the_runs_own(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_bytes(b"train: [\xff")
    with pytest.raises(ConfigError, match=r"run/config.yaml: the run's own config is damaged, not yours"):
        run(tmp_path / "run")


def test_a_run_directory_that_reads_as_a_pattern_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="would be read as a pattern"):
        run(tmp_path / "run[1]")
    assert not any(tmp_path.iterdir())


def test_estimates_that_are_not_those_of_the_checkpoint_are_refused(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    file = tmp_path / "run/estimates.json"
    saved = json.loads(file.read_text())
    language = next(iter(next(iter(saved["sources"].values())).values()))
    language[0] *= 1.5
    file.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="estimates.json: not the estimates that the checkpoint of step 10"):
        run(tmp_path / "run")
    file.unlink()
    assert run(tmp_path / "run") == 0


def run_with_changes(run_dir, changes: dict, *overrides) -> int:
    settings = [f"{key}={value}" for key, value in changes.items()]
    return train(tiny(run_dir, *overrides, *settings), Console(file=io.StringIO()), change=list(changes))


def history(run_dir):
    return [(line["step"], line["key"], line["old"], line["new"]) for line in past_changes(run_dir / "history.jsonl")]


WSD = ("optimizer.schedule=wsd", "optimizer.decay=2 steps", "optimizer.warmup=2 steps")


@pytest.mark.slow
def test_a_longer_budget_goes_on_as_if_it_had_been_so_from_the_start(tmp_path):
    """In the constant part of its schedule a run knows nothing of its end."""
    tokens = tiny("unused").tokens_per_step
    assert run(tmp_path / "long", *WSD, f"train.budget_tokens={12 * tokens}") == 0
    short = (*WSD, f"train.budget_tokens={9 * tokens}")
    assert run(tmp_path / "run", *short, "train.stop_at_step=6") == 0
    longer = {"train.budget_tokens": 12 * tokens}
    with pytest.raises(ConfigError, match=rf"or go on with --change train.budget_tokens={12 * tokens}$"):
        run(tmp_path / "run", *WSD, f"train.budget_tokens={12 * tokens}")
    assert run_with_changes(tmp_path / "run", longer, *WSD) == 0
    assert_same_bits(outcome(tmp_path / "run"), outcome(tmp_path / "long"))
    assert history(tmp_path / "run") == [(6, "train.budget_tokens", 9 * tokens, 12 * tokens)]
    # The same command again, and the config as it is now, change nothing more.
    assert run_with_changes(tmp_path / "run", longer, *WSD) == run(
        tmp_path / "run", *WSD, f"train.budget_tokens={12 * tokens}"
    )
    assert len(history(tmp_path / "run")) == 1


@pytest.mark.slow
def test_another_learning_rate_holds_from_the_next_step_on_and_survives_stops(undisturbed, tmp_path):
    change = {"optimizer.learning_rate": 0.0003, "optimizer.final_fraction": 0.5}
    for name, stops in (("once", ()), ("twice", (9,))):
        shutil.copytree(undisturbed, tmp_path / name)
        assert run(tmp_path / name, "train.rewind=8", "train.stop_at_step=8") == 0
        for stop in stops:
            assert run_with_changes(tmp_path / name, change, f"train.stop_at_step={stop}") == 0
        assert run_with_changes(tmp_path / name, change) == 0
    assert_same_bits(outcome(tmp_path / "once"), outcome(tmp_path / "twice"))
    assert [key for _, key, *_ in history(tmp_path / "twice")] == sorted(change)
    rates = {e["step"]: e["learning_rate"] for e in read_metrics(tmp_path / "once/metrics.jsonl", "train")}
    before = {e["step"]: e["learning_rate"] for e in read_metrics(undisturbed / "metrics.jsonl", "train")}
    assert rates[8] == before[8] and rates[9] != before[9]
    write_report(tmp_path / "once")
    export_hf(tmp_path / "once", tmp_path / "hf")
    for page in ("once/report.html", "hf/README.md"):
        assert "optimizer.learning_rate was changed from" in (tmp_path / page).read_text(), page


@pytest.mark.slow
def test_another_batch_size_goes_on_with_the_same_documents_and_counts_its_tokens(tmp_path):
    """Of a run of 10 steps of 8 rows: 4 of them, and then 3 of 16."""
    larger, goes_on = {"train.batch_size": 16}, (*WSD, "train.log_every_steps=1")
    assert run(tmp_path / "once", *goes_on, "train.stop_at_step=4") == 0
    with pytest.raises(ConfigError, match="train.batch_size=12: this run's rows are dealt to 8 lanes for good"):
        run_with_changes(tmp_path / "once", {"train.batch_size": 12}, *goes_on)
    with pytest.raises(ConfigError, match="or go on with --change train.batch_size=16$"):
        run(tmp_path / "once", *goes_on, "train.batch_size=16")
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    assert run_with_changes(tmp_path / "once", larger, *goes_on) == 0
    assert run_with_changes(tmp_path / "twice", larger, *goes_on, "train.stop_at_step=6") == 0
    # Afterwards the run's own size is that of the config.
    assert run(tmp_path / "twice", *goes_on, "train.batch_size=16") == 0
    assert_same_bits(outcome(tmp_path / "once"), outcome(tmp_path / "twice"))
    lines, data, _ = outcome(tmp_path / "once")
    assert [(x["step"], x["tokens"]) for x in lines] == [
        *((n, n * 256) for n in range(1, 5)),
        (5, 1536),
        (6, 2048),
        (7, 2560),
    ]
    assert data["lanes"].shape[0] == 8 and data["lanes"][..., 6].sum() == 2560 == load_info(tmp_path / "once")["tokens"]
    assert history(tmp_path / "twice") == [(4, "train.batch_size", 8, 16)]
    kept = load([str(tmp_path / "twice/config.yaml")])
    assert (kept.data.lanes, kept.total_steps, [kept.batch_size_at(n) for n in (4, 5)]) == (8, 7, [8, 16])
    # An audit draws each step by the size that it had.
    assert [len(audit(tmp_path / "once", step)) for step in (3, 6)] == [8, 16]
    write_report(tmp_path / "once")
    export_hf(tmp_path / "once", tmp_path / "hf")
    for page in ("once/report.html", "hf/README.md"):
        assert "train.batch_size was changed from 8 to 16" in (tmp_path / page).read_text(), page
    assert "(16 rows of 32); 8 rows up to step 4" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.slow
def test_a_rewind_to_before_a_change_of_the_batch_size_takes_it_back(tmp_path):
    keep = (*WSD, "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    assert run(tmp_path / "run", *keep, "train.stop_at_step=4") == 0
    larger = {"train.batch_size": 16}
    assert run_with_changes(tmp_path / "run", larger, *keep, "train.stop_at_step=5") == 0
    back = (*keep, "train.batch_size=16", "train.rewind=2", "train.stop_at_step=4")
    assert run(tmp_path / "run", *back) == 0
    assert load_info(tmp_path / "run")["tokens"] == 2 * 256 + 2 * 512
    assert [line[0] for line in history(tmp_path / "run")] == [4, 2]
    assert load([str(tmp_path / "run/config.yaml")]).batch_size_at(3) == 16


def test_what_no_run_may_change_is_refused_by_name(undisturbed, tmp_path):
    for key, value in (("train.z_loss", 1.0), ("train.seed", 3)):
        with pytest.raises(
            ConfigError, match=f"--change {key}: is fixed for a run's life; --change takes .*learning_rate"
        ):
            run_with_changes(tmp_path / "run", {key: value})
