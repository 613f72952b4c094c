"""The model card: numbers from the run's records up to the exported step, in the right rows, and no path or key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from data_corpus import data_config, documents, run_config, write
from hf_models import save, transformers_model

from easylm_mling.checkpoint import Checkpoints
from easylm_mling.config import ConfigError, SourceConfig, to_tree
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.mixture import COUNTERS
from easylm_mling.hf.card import model_card
from easylm_mling.hf.exporting import export_hf, stored_model
from easylm_mling.hf.importing import import_hf
from easylm_mling.metrics import MetricsLog
from easylm_mling.step import TrainState, init_params

STEP = 3
# Source -> (tokens, documents, whole epochs of the lane that is behind); not in the order of the alphabet.
CONSUMED = {"zebra": (3000, 30, 0), "many": (1000, 7, 2), "apple": (0, 0, 0)}


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
    for s, (tokens, count, epochs) in enumerate(CONSUMED.values()):
        lanes[:, s, COUNTERS.index("tokens")] = tokens // 2
        lanes[:, s, COUNTERS.index("documents")] = count - count // 2, count // 2
        lanes[:, s, COUNTERS.index("epoch")] = epochs, epochs + 1
    params, count = jax.jit(lambda: init_params(config.model, 0))(), jnp.int32(STEP)
    with Checkpoints(root / "run") as checkpoints:
        info = {"config": to_tree(config), "tokens": 4000, "tokenizer": "f", "data": "f"}
        checkpoints.save(TrainState(count, params, (count,), count, count), {"lanes": lanes}, info)
    build_catalog(data).save(root / "run" / "catalog.json")
    with MetricsLog(root / "run" / "metrics.jsonl") as log:
        for step in (0, 3, 5):
            log.write("eval", step, loss=9.0 - step, sources={"zebra": 8.0 - step, "many": 7.0 - step})
            log.write("train", step, loss=1.0, tokens_per_second=1000.0 * (step + 1))
    return root / "run"


def card(run, name="me/mine", languages=()):
    text = model_card(run, stored_model(run), STEP, "bfloat16", name, languages)
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def row(body, first):
    (line,) = [line for line in body.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def tables(body):
    return body.split("## Losses")


def test_the_data_table_says_what_was_consumed(run):
    data, _ = tables(card(run)[1])
    assert row(data, "zebra") == ["-", "yes", "30", "3,000", "75.00%"]
    assert row(data, "many") == ["3", "no, read 2 times", "7", "1,000", "25.00%"]
    assert row(data, "apple") == ["-", "yes", "0", "0", "0.00%"]
    assert "Languages of many: jpn_Jpan, kor_Hang, other." in data and "4,000 tokens (3 steps)" in data


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


def test_the_export_holds_the_card(run, tmp_path):
    export_hf(run, tmp_path / "out", name="me/mine", languages=("zh",))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text == model_card(run, stored_model(run), STEP, "bfloat16", "me/mine", ("zh",))


def test_the_base_is_found_through_the_runs_between(tmp_path, monkeypatch):
    from easylm_mling.hf import importing

    source = save(transformers_model(family="gemma2"), tmp_path / "source")
    monkeypatch.setattr(importing, "local_directory", lambda *_: source)
    import_hf("google/gemma-2-2b", tmp_path / "imported", revision="abc")
    model = stored_model(tmp_path / "imported")
    body = model_card(tmp_path / "imported", model, 0, "float32", "out")
    front = yaml.safe_load(body.split("---\n")[1])
    assert front["base_model"] == "google/gemma-2-2b" and "taken from [google/gemma-2-2b]" in body
    assert "## Data" not in body

    config = run_config(data_config(write(tmp_path / "x", "jsonl", documents(3))), 4)
    for name, init_from in (("first", "imported"), ("second", "first")):
        tree = to_tree(dataclasses.replace(config, init_from=str(tmp_path / init_from)))
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save_params({"x": jnp.zeros(1)}, {"config": tree, "tokens": 5})
        build_catalog(config.data).save(tmp_path / name / "catalog.json")
    nothing = {"lanes": np.zeros((1, 1, len(COUNTERS)), np.int64)}
    monkeypatch.setattr("easylm_mling.hf.card.load_data_state", lambda *_: nothing)
    text = model_card(tmp_path / "second", model, 0, "float32", "out")
    assert "https://huggingface.co/google/gemma-2-2b) at abc" in text and "No text was held out" in text
