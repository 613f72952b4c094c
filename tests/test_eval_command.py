"""The command `eval`: suites, checks before anything is computed, tables, items and paired differences."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

import numpy as np  # noqa: E402
from eval_models import save  # noqa: E402

from easylm_mling.cli.main import main  # noqa: E402
from easylm_mling.errors import ConfigError  # noqa: E402
from easylm_mling.evaluation.results import paired_difference, read_results  # noqa: E402
from easylm_mling.evaluation.scoring.suites import load_suite  # noqa: E402

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save(folder / "one"), save(folder / "two", rms_norm_eps=1.0)


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
    """The results of both models on the quick suite, by the command line."""
    out = tmp_path_factory.mktemp("evaluated")
    for model in models:
        assert (
            main(["eval", str(model), "--suite", "quick", "--dtype", "float32", "--output", str(out / model.name)]) == 0
        )
    return out


def test_scores_are_those_of_the_items(evaluated):
    results = read_results(evaluated / "one" / "results-quick.json")
    assert [(s.row, s.measure, s.shots) for s in results.scores] == [
        ("sentence ends", "acc", "0"), ("counting on", "exact_match", "3")
    ]  # fmt: skip
    items = [json.loads(line) for line in (evaluated / "one" / "items-quick.jsonl").read_text().splitlines()]
    ends = [i for i in items if i["task"].startswith("pack_ends")]
    assert len(ends) == 48 and len(items) == 64
    # Chosen from the log-likelihoods that are written beside it.
    right = [int(np.argmax([float(r[0]) for r in i["filtered_resps"]]) == int(i["target"])) for i in ends]
    assert [int(i["measures"]["acc"]) for i in ends] == right and 0 < sum(right) < 48
    assert results.scores[0].value == pytest.approx(np.mean(right), abs=1e-12)
    page = (evaluated / "one" / "results-quick.md").read_text()
    assert "| sentence ends | 1.0 | 0 | test | acc |" in page and "| test (shots: train) | exact_match |" in page
    assert "one BOS (id 2)" in page


def test_paired_differences(evaluated):
    new, old = (read_results(evaluated / name / "results-quick.json") for name in ("two", "one"))
    score = new.scores[0]
    difference, error = paired_difference(new, old, score)
    a, b = ([i for values in r.values(score).values() for i in values.values()] for r in (new, old))
    d = np.subtract(a, b)
    assert difference == pytest.approx(new.scores[0].value - old.scores[0].value) and difference != 0
    assert error == pytest.approx(math.sqrt(((d - d.mean()) ** 2).sum() / 47 / 48))
    assert paired_difference(new, new, score) == (0, 0)


def test_a_second_evaluation_computes_nothing_and_shows_the_baseline(models, evaluated, capsys, monkeypatch):
    from easylm_mling.evaluation.generation import Writer
    from easylm_mling.evaluation.scoring.scorer import Scorer

    for kind, name in ((Scorer, "score"), (Writer, "write")):
        monkeypatch.setattr(kind, name, lambda *a: pytest.fail("a request is computed twice"))
    before = (evaluated / "two" / "items-quick.jsonl").read_bytes()
    assert main(
        ["eval", str(models[1]), "--suite", "quick", "--dtype", "float32", "--output", str(evaluated / "two"), "--baseline",
         str(evaluated / "one" / "results-quick.json")]
    ) == 0  # fmt: skip
    assert (evaluated / "two" / "items-quick.jsonl").read_bytes() == before
    shown = capsys.readouterr().out
    assert "± paired" in shown and "answers of earlier evaluations" in shown


def test_wrong_input_ends_in_one_line_before_a_model_is_loaded(models, evaluated, capsys, monkeypatch, tmp_path):
    from easylm_mling.evaluation import command

    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    pack, model = str(ROOT / "data" / "eval"), str(models[0])
    twelve = "rows: [{task: pack_ends, shots: 5}]\ninclude: [" + pack + "]\n"
    (tmp_path / "shots.yaml").write_text(twelve)
    (tmp_path / "wrong.yaml").write_text("rows: [{task: pack_ends, shot: 5}]\n")
    for arguments, message in [
        (["--suite", "quik"], "no such suite; name a YAML file or one of kobest, mling, quick"),
        (["--suite", str(tmp_path / "shots.yaml")], "pack_ends_ko (5 shots are wanted, and its split train has 4)"),
        (["--suite", str(tmp_path / "wrong.yaml")], "a row is `row`, `task`, `shots` and `measure`"),
        (["--tasks", "pack_ends", "--include-path", "nowhere"], "is no folder"),
        (["--suite", "quick", "--shots", "3"], "a suite has its own shots"),
        (["--suite", "quick", "--max-length", "0"], "--max-length 0: the model reads 1 to "),
        (["--suite", "quick", "--template", "alpaca"], "--template: is of --form chat or both"),
        (["--suite", "quick", "--baseline", str(tmp_path / "none.json")], "name a results-SUITE.json"),
    ]:
        assert main(["eval", model, *arguments, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
    assert not (tmp_path / "out").exists()


def test_a_baseline_of_other_items_is_refused(models, evaluated, capsys, tmp_path):
    arguments = [
        "eval",
        str(models[0]),
        "--suite",
        "quick",
        "--dtype",
        "float32",
        "--limit",
        "2",
        "--output",
        str(tmp_path),
    ]
    assert main([*arguments, "--baseline", str(evaluated / "one" / "results-quick.json")]) == 2
    assert "it has other items of pack_ends_en (12, and 2 here)" in capsys.readouterr().err
    # What was computed is kept.
    assert "no score to publish" in (tmp_path / "results-quick.md").read_text()


def test_the_suites_of_the_repository():
    card = load_suite("mling")
    assert len(card.rows) == 29
    shots = {row.task: row.shots for row in card.rows}
    assert shots["haerae"] == 0 and shots["kmmlu_direct"] == 5 and shots["xwinograd_jp"] == 0
    assert [shots[f"ja_leaderboard_{t}"] for t in
            ("jcommonsenseqa", "jnli", "marc_ja", "jsquad", "jaqket_v2", "xlsum", "mgsm")] == [3, 3, 3, 2, 1, 1, 5]  # fmt: skip
    assert len(load_suite("kobest").rows) == 5


def test_a_suite_without_rows_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("rows: 3\n")
    with pytest.raises(ConfigError, match="a suite has `rows`"):
        load_suite(str(tmp_path / "bad.yaml"))


@pytest.mark.slow
def test_every_task_of_the_suites_is_in_the_harness_with_its_measure():
    """The index of all tasks takes half a minute."""
    from lm_eval.tasks import TaskManager

    index = {*TaskManager().all_tasks}
    for name in ("mling", "kobest"):
        assert not {row.task for row in load_suite(name).rows} - index
