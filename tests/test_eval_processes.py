"""`eval` by two processes: the scores of one, from requests that only the first knows."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from eval_models import save  # noqa: E402
from processes import ROOT, ends, free_port, output_of, printed, train_here, xla_flags  # noqa: E402


def evaluate(model, run_dir, processes: int, *flags: str, suite: str = "quick", everything: bool = False):
    """Evaluate on two devices, by as many processes; into `run_dir`, or `everything` that the run `model` keeps."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(2 // processes),
    }
    place, started = f"--coordinator=localhost:{free_port()}", []
    for i in range(processes):
        command = [sys.executable, "-m", "easylm_mling", "eval", str(model), "--suite", suite, "--dtype", "float32"]
        command += ["--all"] if everything else ["--output", str(run_dir)]
        command += [place, f"--processes={processes}", f"--process-id={i}", *flags]
        with open(output_of(run_dir, i), "ab") as output:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
    return ends(run_dir, started, 400)


@pytest.mark.slow
def test_two_processes_have_the_scores_of_one(tmp_path):
    model = save(tmp_path / "model")
    for processes in (1, 2):
        assert evaluate(model, tmp_path / str(processes), processes) == [0] * processes, printed(tmp_path / "2")
    one, two = tmp_path / "1", tmp_path / "2"
    for name in ("items-quick.jsonl", "results-quick.md"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    items = [json.loads(line) for line in (two / "items-quick.jsonl").read_text().splitlines()]
    assert len(items) == 64 and len({str(i["filtered_resps"]) for i in items}) > 50
    # Only the first speaks and writes.
    assert output_of(two, 0).read_text().count("sentence ends") == 1
    assert "sentence ends" not in output_of(two, 1).read_text()
    # What only the first can know to be wrong ends the other, too.
    first, other = evaluate(model, tmp_path / "wrong", 2, "--baseline", str(tmp_path / "none.json"))
    assert first == 2 and other != 0
    assert "name a results-SUITE.json" in output_of(tmp_path / "wrong", 0).read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_two_processes_choose_the_checkpoint_that_one_chooses(tmp_path):
    keep = (
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=3",
        "train.budget_tokens=1536",
        "optimizer.learning_rate=3e-3",
    )
    train_here(tmp_path / "run", *keep, "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")
    shutil.copytree(ROOT / "data" / "eval", tmp_path / "tasks")
    (tmp_path / "own.yaml").write_text(
        "include: [tasks]\nrows: [{row: ends, task: pack_ends, shots: 0, measure: acc}]\n"
    )
    own, written = str(tmp_path / "own.yaml"), {}
    for processes in (1, 2):
        # The same path, as it stands in what is written.
        run, said = tmp_path / "evaluated", tmp_path / str(processes)
        shutil.copytree(tmp_path / "run", run)
        assert evaluate(run, said, processes, suite=own, everything=True) == [0] * processes, printed(said)
        names = ("results-own.md", "items-own.jsonl", "best-own.json")
        files = (f for f in (run / "evaluations").glob("**/*") if f.name in names)
        written[processes] = {str(f.relative_to(run)): f.read_bytes() for f in files}
        assert output_of(said, 0).read_text().count("the best is step") == 1
        if processes == 2:
            assert "the best is step" not in output_of(said, 1).read_text()
            # What is done is not done again, and what only the first can know to be wrong ends the other, too.
            assert evaluate(run, tmp_path / "again", 2, suite=own, everything=True) == [0, 0]
            (tmp_path / "tasks" / "ends_zh.jsonl").unlink()
            first, other = evaluate(run, tmp_path / "wrong", 2, suite=own, everything=True)
            assert first == 2 and other != 0
            assert "1 of its tasks cannot be had here" in output_of(tmp_path / "wrong", 0).read_text()
        shutil.rmtree(run)
    assert written[1] == written[2] and len(written[1]) == 2 * 2 + 1
