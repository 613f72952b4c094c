"""`eval` by two processes: the scores of one, from requests that only the first knows."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from eval_models import save  # noqa: E402
from processes import ROOT, ends, free_port, output_of, printed  # noqa: E402


def evaluate(model, run_dir, processes: int, *flags: str):
    """Evaluate on two devices, by as many processes."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}",
    }
    place, started = f"--coordinator=localhost:{free_port()}", []
    for i in range(processes):
        command = [sys.executable, "-m", "easylm_mling", "eval", str(model), "--suite", "quick", "--dtype", "float32"]
        command += ["--output", str(run_dir), place, f"--processes={processes}", f"--process-id={i}", *flags]
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
