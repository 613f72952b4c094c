"""`eval RUN --all` on a real run: its picture, its page, its card, and scores of other items that are not mixed."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from processes import ROOT, train_here  # noqa: E402

from easylm_mling.checkpoint.best import best_step  # noqa: E402
from easylm_mling.cli.main import main  # noqa: E402
from easylm_mling.monitoring.report.collect import collect  # noqa: E402
from easylm_mling.monitoring.report.page import forgetting_lines  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with six checkpoints, and a suite of its own."""
    folder = tmp_path_factory.mktemp("all")
    keep = ("checkpoint.every_steps=2", "checkpoint.keep_last=6", "eval.every_steps=2", "train.budget_tokens=3072")
    mesh = ("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")
    train_here(folder / "run", *keep, *mesh, "optimizer.learning_rate=3e-3")
    shutil.copytree(ROOT / "data" / "eval", folder / "tasks")
    (folder / "own.yaml").write_text("include: [tasks]\nrows: [{row: ends, task: pack_ends, shots: 0, measure: acc}]\n")
    return folder / "run"


def evaluate(run) -> int:
    return main(["eval", str(run), "--suite", str(run.parent / "own.yaml"), "--all", "--dtype", "float32"])


def test_all_checkpoints_are_scored_drawn_and_the_card_says_how_the_best_was_chosen(run, capsys):
    assert evaluate(run) == 0
    best, history = best_step(run, "own"), collect(run)
    assert len(history.scores["own", "ends"].points) == 6 and history.best == {"own": best}
    assert (run / "evaluations" / "scores-own.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "Scores on own" in page and "Gained and forgotten" in page and ">best</" in page
    # Of every source what has changed of its held-out text, in bits a byte, since the beginning.
    lines = forgetting_lines(history)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [x["sources_bits_per_byte"] for x in metrics if x["kind"] == "eval"]
    name = next(n for n in measured[0] if n in {line.name for line in lines})
    [line] = [line for line in lines if line.name == name]
    assert [y for _, y in line.points] == pytest.approx([m[name] - measured[0][name] for m in measured])
    out = run.parent / "hf"
    assert main(["export-hf", str(run), str(out), "--best", "own"]) == 0
    card, noted = (out / "README.md").read_text(), json.loads((run / "evaluations" / "best-own.json").read_bytes())
    assert (
        "This step is the best of 6 kept checkpoints by the suite own: chosen by the centred mean of one half" in card
    )
    assert f"and {noted['on_the_other_half']:.4f} on the other half, which had no part in the choice." in card


@pytest.mark.slow
def test_scores_of_other_items_or_of_another_harness_are_not_mixed(run, capsys, monkeypatch):
    from easylm_mling.evaluation.scoring import tasks

    assert evaluate(run) == 0
    capsys.readouterr()
    assert evaluate(run) == 0
    assert "evaluated again" not in capsys.readouterr().out
    file = run.parent / "tasks" / "ends_en.jsonl"
    file.write_text(file.read_text().replace("umbrella stands of sand", "umbrella stands"))
    assert evaluate(run) == 0
    said = capsys.readouterr().out
    assert said.count("evaluated again: pack_ends_en, or the harness, has changed since (lm_eval 0.4.13 then)") == 6
    assert evaluate(run) == 0
    assert "evaluated again" not in capsys.readouterr().out
    monkeypatch.setattr(tasks, "version", lambda name: "0.5.0")
    assert evaluate(run) == 0
    assert "pack_ends_en, pack_ends_ja, pack_ends_ko and 1 more, or the harness" in capsys.readouterr().out
