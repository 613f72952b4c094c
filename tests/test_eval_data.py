"""`fetch-eval`: the data of a suite kept in a folder, and the same scores from there without its source."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

import jax  # noqa: E402
from datasets import ClassLabel, Dataset, Features, Value  # noqa: E402
from eval_models import save  # noqa: E402

from easylm_mling.cli.main import main  # noqa: E402
from easylm_mling.evaluation.scoring.suites import load_suite, with_data  # noqa: E402
from easylm_mling.evaluation.scoring.tasks import load_rows  # noqa: E402

# Its data set is loaded by `datasets` from a path, and its items are made by the names of a label.
TASK = """
task: {name}
dataset_path: {path}
output_type: multiple_choice
training_split: train
test_split: test
process_docs: !function making.named
doc_to_text: "{{{{question}}}} is"
doc_to_choice: [warm, cold]
doc_to_target: named
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""
MAKING = """
def named(data):
    names = data.features["label"].names
    return data.map(lambda doc: {"named": ["warm", "cold"].index(names[doc["label"]])})
"""


@pytest.fixture
def suite(tmp_path):
    """A suite of one group of two tasks, in a folder with its data set."""
    features = Features(
        {"question": Value("string"), "label": ClassLabel(names=["cold", "warm"]), "when": Value("int32")}
    )
    for split, words in (("test", ["ice", "fire", "빙하", "太陽"] * 3), ("train", ["snow", "soup", "lava"])):
        rows = [{"question": f"{w}\r\n{i}\u2028", "label": i % 2, "when": None} for i, w in enumerate(words)]
        (tmp_path / "set").mkdir(exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "making.py").write_text(MAKING)
    for name in ("hot", "hotter"):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, path=tmp_path / "set"))
    (tasks / "heat.yaml").write_text("group: heat\ntask: [hot, hotter]\naggregate_metric_list: [{metric: acc}]\n")
    (tmp_path / "own.yaml").write_text("include: [tasks]\nrows: [{task: heat, shots: 2, measure: acc}]\n")
    return tmp_path / "own.yaml"


@pytest.fixture
def quiet_cache(monkeypatch, tmp_path):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


def test_scores_are_the_same_from_the_folder_and_a_changed_file_is_refused(suite, quiet_cache, tmp_path, capsys):
    model, kept = save(tmp_path / "model"), tmp_path / "kept"
    command = ["eval", str(model), "--suite", str(suite), "--dtype", "float32"]
    assert main([*command, "--output", str(tmp_path / "there")]) == 0
    assert main(["fetch-eval", str(suite), str(kept)]) == 0
    assert "hotter: 12 of test, 3 of train" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "set")
    shutil.rmtree(tmp_path / "cache")
    assert main([*command, "--output", str(tmp_path / "here"), "--data", str(kept)]) == 0
    for name in ("items-own.jsonl", "results-own.md"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    # What is there is not fetched again: its source is gone.
    assert main(["fetch-eval", str(suite), str(kept)]) == 0
    assert "hot: is there" in capsys.readouterr().out
    file = kept / "hot" / "test.jsonl"
    file.write_bytes(file.read_bytes().replace(b"fire", b"fury"))
    assert main([*command, "--output", str(tmp_path / "here"), "--data", str(kept)]) == 2
    assert "is not what fetch-eval wrote, by its digest" in capsys.readouterr().err
    assert main([*command, "--data", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_what_cannot_be_had_is_named_and_the_rest_is_kept(suite, quiet_cache, tmp_path, capsys):
    broken = tmp_path / "tasks" / "hot.yaml"
    broken.write_text(broken.read_text().replace(str(tmp_path / "set"), str(tmp_path / "nowhere")))
    kept = tmp_path / "kept"
    assert main(["fetch-eval", str(suite), str(kept)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 1 tasks of own cannot be had: hot (") and "hotter" not in error
    assert list(json.loads((kept / "manifest.json").read_bytes())["tasks"]) == ["hotter"]
    assert main(["eval", "nowhere", "--suite", str(suite), "--data", str(kept)]) == 2
    # The command goes on from there.
    (tmp_path / "nowhere").symlink_to(tmp_path / "set")
    assert main(["fetch-eval", str(suite), str(kept)]) == 0
    assert [*load_rows(with_data(load_suite(str(suite)), str(kept)))[0].tasks] == ["hot", "hotter"]
