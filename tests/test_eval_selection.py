"""The best checkpoint: chosen on one half of the items, reported on the other."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from easylm_mling.errors import ConfigError
from easylm_mling.evaluation import checkpoints
from easylm_mling.evaluation.options import EvalOptions
from easylm_mling.evaluation.results import Results, Score, read_results, write_results
from easylm_mling.evaluation.scoring.suites import Suite, SuiteRow
from easylm_mling.evaluation.selection import CHOOSING, REPORTED, centred_mean, choose, half_of

OPTIONS = EvalOptions("run", Suite("s", (SuiteRow("A", "a"),)))


def results(folder: Path, right: dict[str, np.ndarray], choices: dict[str, int]) -> Results:
    """Results whose items are right as `right` says, of tasks with so many choices (1: a text)."""
    samples = {
        task: [
            {"doc_id": n, "doc_hash": f"{n * 2654435761 % 2**32:08x}", "filter": "none", "target": "0", "metrics": ["acc"],
             "acc": float(value), "filtered_resps": [[-1.0, False]] * choices[task]}
            for n, value in enumerate(values)
        ]
        for task, values in right.items()
    }  # fmt: skip
    scores = [
        Score(task, task, "acc", "none", float(np.mean(v)), None, "1.0", "0", "test", [task], True)
        for task, v in right.items()
    ]
    about = {
        "suite": "s",
        "limit": None,
        "asked": OPTIONS.asked,
        "weights": "w bfloat16",
        "tasks": {"a": "1"},
        "counts": {},
    }
    return write_results(folder, "s", about, scores, {"samples": samples}, [])


def test_centred_means_count_tasks_alike_whatever_their_choices(tmp_path):
    rng = np.random.default_rng(0)
    guessed = results(
        tmp_path / "guess", {"two": rng.random(4000) < 1 / 2, "four": rng.random(4000) < 1 / 4}, {"two": 2, "four": 4}
    )
    assert abs(centred_mean(guessed, CHOOSING)) < 0.06 and abs(centred_mean(guessed, REPORTED)) < 0.06
    whole = results(tmp_path / "all", {"two": np.ones(50), "text": np.zeros(50)}, {"two": 2, "text": 1})
    assert centred_mean(whole, CHOOSING) == centred_mean(whole, REPORTED) == 0.5


def test_the_half_that_chooses_overshoots_and_the_other_does_not(tmp_path):
    """Ten checkpoints that are equal: the best of them looks better on the items that chose it, and only there."""
    rng, gaps = np.random.default_rng(1), []
    for trial in range(20):
        each = {
            step: results(tmp_path / f"{trial}-{step}", {"a": rng.random(200) < 0.5}, {"a": 1}) for step in range(10)
        }
        best, candidates = choose(each)
        assert best.choosing == max(c.choosing for c in candidates)
        gaps.append((best.choosing - 0.5, best.reported - 0.5))
    chosen, other = np.mean(gaps, axis=0)
    # 1.54 standard errors of 100 items are .077.
    assert 0.06 < chosen < 0.095 and abs(other) < 0.03


def test_of_equal_ones_the_latest_is_the_best_and_halves_do_not_depend_on_the_model(tmp_path):
    same = {step: results(tmp_path / str(step), {"a": np.ones(40)}, {"a": 2}) for step in (5, 20, 10)}
    assert choose(same)[0].step == 20 and [c.step for c in choose(same)[1]] == [5, 10, 20]
    items = [json.loads(line) for line in (tmp_path / "5" / "items-s.jsonl").read_text().splitlines()]
    assert {half_of(item) for item in items} == {CHOOSING, REPORTED}
    none = Results({}, [], tmp_path / "5" / "items-s.jsonl")
    with pytest.raises(ConfigError, match="use a suite with more items"):
        centred_mean(none, CHOOSING)


def test_every_checkpoint_is_evaluated_once(tmp_path, monkeypatch):
    """What is done is not done again, unless it was measured another way."""
    calls = []

    def evaluate(options, console, rows):
        calls.append(options.step)
        right = np.arange(60) % 3 < (2 if options.step == 20 else 1)
        return results(tmp_path / "evaluations" / str(options.step), {"a": right}, {"a": 2})

    weights = {"all": "w"}
    monkeypatch.setattr(checkpoints, "evaluate_model", evaluate)
    monkeypatch.setattr(
        checkpoints, "identity_of_checkpoint", lambda o: f"{weights.get(o.step, weights['all'])} {o.dtype}"
    )
    monkeypatch.setattr(checkpoints, "_load", lambda options: ([], {"a": "1"}))
    for name in ("draw_scores", "write_report"):
        monkeypatch.setattr(checkpoints, name, lambda *a: "")
    for step in (10, 20, 30):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    options = EvalOptions(str(tmp_path), OPTIONS.suite)
    quiet = Console(quiet=True)
    assert checkpoints.evaluate_run(options, quiet).step == 20 and calls == [10, 20, 30]
    stored = json.loads((tmp_path / "evaluations" / "best-s.json").read_text())
    assert stored["best"] == 20 and [s["step"] for s in stored["steps"]] == [10, 20, 30]
    (tmp_path / "checkpoints" / "40").mkdir()
    assert checkpoints.evaluate_run(options, quiet).step == 20 and calls == [10, 20, 30, 40]
    # Half of a file is no result.
    file = tmp_path / "evaluations" / "20" / "results-s.json"
    file.write_bytes(file.read_bytes()[:50])
    checkpoints.evaluate_run(options, quiet)
    assert calls[4:] == [20] and read_results(file).scores
    checkpoints.evaluate_run(EvalOptions(str(tmp_path), OPTIONS.suite, dtype="float32"), quiet)
    assert calls[5:] == [10, 20, 30, 40]
    # A rewound run has done step 30 again.
    weights[30] = "others"
    checkpoints.evaluate_run(options, quiet)
    assert calls[9:] == [30]
    # Scores of other items, or of another harness, are not mixed.
    monkeypatch.setattr(checkpoints, "_load", lambda options: ([], {"a": "2"}))
    checkpoints.evaluate_run(options, quiet)
    assert calls[10:] == [10, 20, 30, 40]
    # A trial on a few items chooses nothing.
    (tmp_path / "evaluations" / "best-s.json").unlink()
    checkpoints.evaluate_run(EvalOptions(str(tmp_path), OPTIONS.suite, limit=2), quiet)
    assert not (tmp_path / "evaluations" / "best-s.json").exists()
    with pytest.raises(ConfigError, match="no checkpoints"):
        checkpoints.evaluate_run(EvalOptions(str(tmp_path / "nowhere"), OPTIONS.suite), quiet)
