"""The script for a GPU: what it says where there is none, and its parts on a CPU with a small model."""

import os
import subprocess
import sys

import pytest
from processes import ROOT


def run(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    for name in ("bash", "dirname", "head"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    ended = run("/bin/bash", ROOT / "benchmarks" / "gpu.sh", PATH=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (3, "")
    assert ended.stderr.startswith("no GPU: ") and ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_its_parts_run_with_a_small_model_on_a_cpu(tmp_path):
    here = {"PYTHON": sys.executable, "XLA_FLAGS": ""}
    parts = ("model", "parity", "step", "step-fp8", "generation")
    ended = run("bash", "benchmarks/gpu.sh", "--tiny", "--out", tmp_path, "--only", *parts, **here)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {p.stem for p in tmp_path.glob("*.txt")} == {"device", *parts}
    assert "float32 logits differ by" in (tmp_path / "parity.txt").read_text()
    assert "tokens a second" in (tmp_path / "step.txt").read_text()
    assert "% of the tokens are the same" in (tmp_path / "generation.txt").read_text()
