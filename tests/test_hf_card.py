"""The model card: numbers from the run's records up to the exported step, in the right rows, and no path or key."""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from data_corpus import data_config, documents, run_config, tokenizer, write
from hf_models import save, transformers_model

from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.cli.main import main
from easylm_mling.config import SourceConfig, to_tree
from easylm_mling.data.catalog import Catalog, build_catalog
from easylm_mling.data.estimates import open_estimates
from easylm_mling.data.mixture import COUNTERS
from easylm_mling.errors import ConfigError
from easylm_mling.hf.card import write_card
from easylm_mling.hf.card_sections import Export
from easylm_mling.hf.exporting import export_hf, stored_model
from easylm_mling.hf.importing import import_hf
from easylm_mling.monitoring.metrics import MetricsLog, read_metrics
from easylm_mling.training.spike_guard import nothing_recent
from easylm_mling.training.state import TrainState, init_params

STEP = 3
# Source -> (tokens, documents); not in the order of the alphabet.
CONSUMED = {"zebra": (30_000, 31), "many": (10_000, 7), "apple": (0, 0)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of three sources, at step 3, with records of step 5 too."""
    root = tmp_path_factory.mktemp("SECRET")
    for place in ("z", "many/jpn_Jpan", "many/kor_Hang", "many/other", "a"):
        write(root / place / "x", "jsonl", documents(40))
    sources = {name: SourceConfig((f"{root}/{name[0]}/x.jsonl",), 1.0) for name in CONSUMED}
    sources["many"] = SourceConfig((f"{root}/many/{{language}}/x.jsonl",), 1.0)
    data = dataclasses.replace(data_config(sources["zebra"].paths), sources=sources, tokenizer="SECRET/tokenizer.model")
    config = dataclasses.replace(run_config(data, 4), run_dir="SECRET", init_from="gone/SECRET/base")
    lanes = np.zeros((2, 3, len(COUNTERS)), np.int64)
    for s, (tokens, count) in enumerate(CONSUMED.values()):
        lanes[:, s, COUNTERS.index("tokens")] = tokens // 2
        lanes[:, s, COUNTERS.index("documents")] = count - count // 2, count // 2
    catalog = build_catalog(data)
    params, count = jax.jit(lambda: init_params(config.model, 0))(), jnp.int32(STEP)
    with Checkpoints(root / "run") as checkpoints:
        info = {"config": to_tree(config), "tokens": 40_000, "tokenizer": "f", "data": catalog.fingerprint}
        state = {"lanes": lanes, "languages": np.zeros((5, 3), np.int64)}
        checkpoints.save(TrainState(count, params, (count,), *[count] * 3, nothing_recent()), state, info)
    catalog.save(root / "run" / "catalog.json")
    open_estimates(root / "run" / "estimates.json", catalog, tokenizer())
    with MetricsLog(root / "run" / "metrics.jsonl") as log:
        for step in (0, 3, 5):
            log.write("eval", step, loss=9.0 - step, sources={"zebra": 8.0 - step, "many": 7.0 - step})
            log.write("train", step, loss=1.0, tokens_per_second=1000.0 * (step + 1))
    return root / "run"


def card(run, name="me/mine", languages=(), step=STEP):
    with tempfile.TemporaryDirectory() as folder:
        write_card(Path(folder), Export(run, Path(run), step, stored_model(run), "bfloat16", name), languages)
        _, front, body = (Path(folder) / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def row(body, first):
    (line,) = [line for line in body.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def tables(body):
    return body.split("## Losses")


def test_the_data_table_says_what_was_consumed(run):
    data, _ = tables(card(run)[1])
    size = sum(len(ids) + 2 for ids in tokenizer().encode(documents(40)))
    for name, folders, languages in (("zebra", 1, "-"), ("many", 3, "3"), ("apple", 1, "-")):
        tokens, count = CONSUMED[name]
        spoken, on_disk, sampled, *counts, epochs = row(data, name)
        assert [spoken, *counts] == [languages, f"{count:,}", f"{tokens:,}", f"{tokens / 40_000:.2%}"]
        assert sampled == ("yes" if tokens < folders * size else "no")
        assert float(epochs) == pytest.approx(tokens / (folders * size), rel=0.05, abs=0.01)
        files = run.parent.glob("many/*/x*" if name == "many" else f"{name[0]}/x*")
        number, unit = on_disk.split()
        assert unit == "KB" and float(number) == pytest.approx(sum(f.stat().st_size for f in files) / 1000, rel=0.005)
    assert {row(data, name)[2] for name in CONSUMED} == {"yes", "no"}
    assert "Languages of many: jpn_Jpan, kor_Hang, other." in data and "40,000 tokens (3 steps)" in data


def test_data_that_was_changed_since_is_not_taken_for_the_steps_own(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    catalog = Catalog.load(run / "catalog.json")
    Catalog(catalog.sources, catalog.settings | {"other": 1}).save(tmp_path / "run" / "catalog.json")
    assert "with other data after this step" in card(tmp_path / "run")[1]


def test_losses_are_those_up_to_the_step(run):
    _, losses = tables(card(run)[1])
    assert row(losses, "corpus") == ["step 0", "step 3"]
    assert row(losses, "zebra") == ["8.0000", "5.0000"] and row(losses, "apple") == ["-", "-"]
    assert row(losses, r"**all**") == ["9.0000", "6.0000"]
    assert row(losses, "speed") == ["2.5K tokens a second (median of the steps logged)"]


def test_the_front_matter_is_what_the_hub_reads(run):
    from huggingface_hub import ModelCardData

    front, body = card(run, languages=("no", "zh"))
    assert front["language"] == ["jpn", "kor", "no", "zh"] and front["library_name"] == "transformers"
    assert front["license"] == "gemma" and "base_model" not in front
    assert ModelCardData(**front).to_dict() == front
    assert "trained from `base` on" in body and 'from_pretrained("me/mine"' in body


def test_no_path_goes_into_the_card(run):
    assert "SECRET" in str(run) and "SECRET" not in str(card(run))


def test_a_language_that_is_no_code_is_refused(run):
    with pytest.raises(ConfigError, match="language 'Japanese' is no ISO 639 code"):
        card(run, languages=("Japanese",))


def test_the_export_holds_the_card_and_its_picture(run, tmp_path):
    export_hf(run, tmp_path / "out", name="me/mine", languages=("zh",))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.split("---\n", 2)[2] == card(run, languages=("zh",))[1] and "](losses.png)" in text
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_line_for_each_source_that_was_measured(run, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, real = [], Axes.plot

    def plot(self, x, y, **settings):
        drawn.append((settings.get("label"), x, y))
        return real(self, x, y, **settings)

    monkeypatch.setattr(Axes, "plot", plot)
    card(run)
    assert drawn == [("zebra", (0, 3), (8.0, 5.0)), ("many", (0, 3), (7.0, 4.0))]


def test_scores_are_those_of_the_step(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    place = tmp_path / "run" / "evaluations" / str(STEP) / "me__mine" / "results_2026.json"
    place.parent.mkdir(parents=True)
    measures = {"alias": "kmmlu", "acc,none": 0.42754, "acc_stderr,none": 0.01, "exact_match,strict": 0.5}
    place.write_text(json.dumps({"results": {"kmmlu": measures}, "versions": {"kmmlu": 2.0}, "n-shot": {"kmmlu": 5}}))
    body = card(tmp_path / "run")[1]
    assert "| kmmlu | 2.0 | 5 | acc | 0.4275 |" in body and "| exact_match (strict) | 0.5000 |" in body
    assert "stderr" not in body and "## Evaluation" not in card(run)[1]


def test_the_base_is_found_through_the_runs_between(tmp_path, monkeypatch):
    from easylm_mling.hf import importing

    source = save(transformers_model(family="gemma2"), tmp_path / "source")
    monkeypatch.setattr(importing, "local_directory", lambda *_: source)
    import_hf("google/gemma-2-2b", tmp_path / "imported", revision="abc")
    model = stored_model(tmp_path / "imported")
    assert model.model_type == "gemma2"
    front, body = card(tmp_path / "imported", step=0)
    assert front["base_model"] == "google/gemma-2-2b" and "taken from [google/gemma-2-2b]" in body
    assert "## Data" not in body

    config = run_config(data_config(write(tmp_path / "x", "jsonl", documents(3))), 4)
    for name, init_from in (("first", "imported"), ("second", "first")):
        tree = to_tree(dataclasses.replace(config, init_from=str(tmp_path / init_from)))
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save_params({"x": jnp.zeros(1)}, {"config": tree, "tokens": 5, "data": "other"})
        build_catalog(config.data).save(tmp_path / name / "catalog.json")
    text = card(tmp_path / "second", step=0)[1]
    assert "https://huggingface.co/google/gemma-2-2b) at abc" in text and "No text was held out" in text


def test_an_average_has_the_runs_card_and_says_what_it_is(run, tmp_path, capsys):
    assert (
        main(["export-hf", str(run), str(tmp_path / "mean"), "--average", "1", "--dtype", "float32", "--verify"]) == 0
    )
    assert "exported the mean of the steps 3" in capsys.readouterr().out
    export_hf(run, tmp_path / "step", dtype="float32")
    assert (tmp_path / "mean" / "model.safetensors").read_bytes() == (
        tmp_path / "step" / "model.safetensors"
    ).read_bytes()
    text = (tmp_path / "mean" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| run, step 3 \| model \| 1 \| `[0-9a-f]{32}` \|", text) and "SECRET" not in text
    without = text[: text.index("## How it was made")] + text[text.index("## Data") :]
    plain = (tmp_path / "step" / "README.md").read_text(encoding="utf-8")
    assert without.replace("mean", "step") == plain.replace("mean", "step")
    # The run's own records say that it was a mean.
    assert [line["averaged"] for line in read_metrics(run / "metrics.jsonl", "export") if "averaged" in line] == [[3]]
    assert main(["export-hf", str(run), str(tmp_path / "more"), "--average", "2"]) == 2
    assert main(["export-hf", str(run), str(tmp_path / "more"), "--average", "1", "--step", "3"]) == 2
    assert not (tmp_path / "more").exists()
