"""An evaluation that is killed again and again: the same table, and no request computed twice."""

import os
import random
import subprocess
import sys
import time
from collections import Counter

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from eval_models import save  # noqa: E402
from processes import ROOT, xla_flags  # noqa: E402

from easylm_mling.storage.jsonl import read_jsonl  # noqa: E402

# The command with small batches, each of which is noted before it is computed.
COUNTING = """
import sys
from functools import partial
from easylm_mling.cli.main import main
from easylm_mling.evaluation import harness
from easylm_mling.evaluation.generation import Writer
from easylm_mling.evaluation.scoring.scorer import Scorer

def noted(compute):
    def call(self, *args):
        with open(sys.argv[1], "a") as calls:
            calls.write(f"{compute.__name__}\\n")
        return compute(self, *args)
    return call

Scorer.score, Writer.write = noted(Scorer.score), noted(Writer.write)
harness.Limits = partial(harness.Limits, batch_tokens=128, row=128, rows=2)
sys.exit(main(sys.argv[2:]))
"""


def start(model, folder, output) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", COUNTING, str(folder) + "-calls", "eval", str(model), "--suite", "quick"]
    command += ["--dtype", "float32", "--output", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def calls_of(folder) -> int:
    file = folder.with_name(f"{folder.name}-calls")
    return len(file.read_text().splitlines()) if file.is_file() else 0


@pytest.mark.slow
def test_killed_at_five_random_moments_it_computes_nothing_twice_and_has_the_same_table(tmp_path):
    model, rng, kills = save(tmp_path / "model"), random.Random(5), 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with open(tmp_path / "output.txt", "w") as output:
        assert start(model, whole, output).wait(200) == 0, (tmp_path / "output.txt").read_text()
        calls = calls_of(whole)
        assert calls >= 15, "too few batches to be killed between"
        moments = sorted(rng.sample(range(1, calls - 1), 5))
        for moment in moments:
            process = start(model, cut, output)
            while process.poll() is None and calls_of(cut) < moment + kills:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            process.kill()
            kills += process.wait(60) == -9
        assert kills >= 4, "it had ended before it was killed"
        assert start(model, cut, output).wait(200) == 0, (tmp_path / "output.txt").read_text()
    for name in ("items-quick.jsonl", "results-quick.md"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    [cache] = cut.glob("requests-*.jsonl")
    times = Counter(key for line in read_jsonl(cache) for key in line["answers"])
    assert set(times.values()) == {1}
    # A kill costs the batch that was under way, at most.
    assert calls <= calls_of(cut) <= calls + kills
