"""Scores on tasks while a run trains: right, always of the same items, and without a trace in the run itself."""

import json
import math
import shutil

import jax
import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from processes import ROOT, assert_same_bits, outcome, printed, run, train_here  # noqa: E402

from easylm_mling.cli.main import main  # noqa: E402
from easylm_mling.config import EvalConfig  # noqa: E402
from easylm_mling.errors import ConfigError  # noqa: E402
from easylm_mling.monitoring.goodput import Goodput  # noqa: E402
from easylm_mling.monitoring.metrics import TIMINGS, read_metrics  # noqa: E402
from easylm_mling.monitoring.report.collect import collect  # noqa: E402
from easylm_mling.monitoring.report.page import page  # noqa: E402
from easylm_mling.monitoring.task_table import before_and_after  # noqa: E402

SUITE = ("eval.suite=quick", "eval.suite_every_steps=4")
# Long enough for every context of the suite.
LONG = (
    "data.sequence_length=128",
    "train.budget_tokens=9216",
    "train.compute_dtype=float32",
    "mesh.data=1",
    "mesh.fsdp=1",
    "mesh.tensor=1",
)


def task_lines(run_dir) -> list[dict]:
    lines = read_metrics(run_dir / "metrics.jsonl", "tasks")
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def train_on_one(run_dir, *overrides: str) -> str:
    """A run on one device: eight simulated ones would only cost time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        return train_here(run_dir, "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", *overrides)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    said = train_on_one(folder / "run", *SUITE, *LONG, "log.tensorboard=true", "eval.suite_items=100")
    return folder / "run", said


def test_they_are_those_of_the_saved_checkpoint_by_the_harness(scored, tmp_path):
    """By what `eval` writes of each item, and the texts of the right answers."""
    run_dir, _ = scored
    lines = task_lines(run_dir)
    assert [line["step"] for line in lines] == [0, 4, 8, 9]
    command = ["eval", str(run_dir), "--suite", "quick", "--dtype", "float32", "--max-length", "128"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    items = [json.loads(line) for line in (tmp_path / "items-quick.jsonl").read_text().splitlines()]
    nats, size, right = 0.0, 0, []
    for language, space in (("ko", " "), ("ja", ""), ("zh", ""), ("en", " ")):
        texts = [
            json.loads(line) for line in (ROOT / "data" / "eval" / f"ends_{language}.jsonl").read_text().splitlines()
        ]
        texts = [text for text in texts if text["split"] == "test"]
        ours = sorted((i for i in items if i["task"] == f"pack_ends_{language}"), key=lambda i: i["doc_id"])
        for text, item in zip(texts, ours, strict=True):
            likelihoods = [float(r[0]) for r in item["filtered_resps"]]
            nats -= likelihoods[text["right"]]
            size += len((space + text["ends"][text["right"]]).encode())
            right.append(likelihoods[text["right"]] == max(likelihoods))
    row = lines[-1]["rows"]["sentence ends"]
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert row["accuracy"] == pytest.approx(sum(right) / 48)
    assert row["centred_accuracy"] == pytest.approx((row["accuracy"] - 1 / 3) / (2 / 3))
    # A text that is written has bits, and no accuracy while the run trains.
    assert lines[-1]["rows"]["counting on"].keys() == {"bits_per_byte"}
    assert lines[-1]["centred_accuracy"] == row["centred_accuracy"]
    # They moved, as the parameters did.
    assert len({line["bits_per_byte"] for line in lines}) == 4


def test_they_are_in_the_records_the_page_and_the_trackers_with_their_cost(scored):
    run_dir, said = scored
    assert "64 items are scored while the run trains" in said and "of the run's time so far goes into it" in said
    goodput = Goodput()
    for event in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines()):
        goodput.add(event)
    last = read_metrics(run_dir / "metrics.jsonl", "tasks")[-1]
    assert 0 < goodput.seconds["tasks"] and 0 < last["share_of_run"] < 1 and last["seconds"] > 0
    history = collect(run_dir)
    assert [y for _, y in history.tasks["bits_per_byte", ""].points] == [
        x["bits_per_byte"] for x in task_lines(run_dir)
    ]
    text = page(history)
    assert "Centred accuracy on tasks" in text and "scoring tasks" in text and "sentence ends" in text
    [file] = (run_dir / "tensorboard").iterdir()
    assert b"tasks/centred_accuracy" in file.read_bytes()


@pytest.mark.slow
def test_a_run_with_it_has_the_bits_of_one_without_also_when_it_is_stopped(tmp_path):
    train_on_one(tmp_path / "without")
    train_on_one(tmp_path / "with", *SUITE, "train.stop_at_step=6")
    train_on_one(tmp_path / "with", *SUITE)
    assert_same_bits(outcome(tmp_path / "with"), outcome(tmp_path / "without"))
    assert [line["step"] for line in task_lines(tmp_path / "with")] == [0, 4, 8, 10]


@pytest.mark.slow
def test_two_processes_have_the_scores_of_one(tmp_path):
    for processes in (1, 2):
        run(tmp_path / str(processes), processes, *SUITE)
    assert_same_bits(outcome(tmp_path / "2"), outcome(tmp_path / "1"))
    assert task_lines(tmp_path / "2") == task_lines(tmp_path / "1") and len(task_lines(tmp_path / "1")) == 4
    assert printed(tmp_path / "2").count("64 items are scored") == 1


def test_a_suite_that_cannot_be_had_ends_in_one_line_before_the_run_begins(tmp_path):
    with pytest.raises(ConfigError, match="quik: no such suite"):
        train_here(tmp_path / "run", "eval.suite=quik")
    shutil.copytree(ROOT / "data" / "eval", tmp_path / "tasks")
    (tmp_path / "tasks" / "ends_zh.jsonl").unlink()
    (tmp_path / "own.yaml").write_text("include: [tasks]\nrows: [{task: pack_ends}]\n")
    with pytest.raises(ConfigError, match="1 of its tasks cannot be had here: pack_ends .*ends_zh.jsonl"):
        train_here(tmp_path / "run", f"eval.suite={tmp_path / 'own.yaml'}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="needs eval.suite"):
        EvalConfig(suite_every_steps=5)


def test_the_summary_the_page_and_the_card_show_them_before_and_after(scored, tmp_path, capsys):
    run_dir, _ = scored
    first, last = (line["rows"] for line in (task_lines(run_dir)[0], task_lines(run_dir)[-1]))
    numbers = [
        f"{line['sentence ends'][key]:.4f}" for key in ("bits_per_byte", "centred_accuracy") for line in (first, last)
    ]
    written = [f"{line['counting on']['bits_per_byte']:.4f}" for line in (first, last)]
    assert numbers[0] != numbers[1] and written[0] != written[1]
    assert main(["summary", str(run_dir)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sentence", "ends", *numbers] in lines and ["counting", "on", *written, "-", "-"] in lines
    assert main(["export-hf", str(run_dir), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "| task | bits a byte, step 0 | bits a byte, step 9 | centred accuracy, step 0 | centred accuracy, step 9 |"
        in card
    )
    assert f"| sentence ends | {' | '.join(numbers)} |" in card
    # An older step's card knows nothing of what came later.
    assert (
        before_and_after(run_dir / "metrics.jsonl", 4)[1][0][2]
        == f"{task_lines(run_dir)[1]['rows']['sentence ends']['bits_per_byte']:.4f}"
    )
    assert before_and_after(run_dir / "metrics.jsonl", 3) == ((), [])
    shown = page(collect(run_dir))
    table = shown[shown.index("bits a byte at first") :].partition("</table>")[0]
    assert (
        "sentence ends" in table
        and "counting on" in table
        and f"{first['sentence ends']['bits_per_byte']:.3f}"[:4] in table
    )
