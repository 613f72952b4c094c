"""kill -9 at random moments of one run, again and again: what comes of it is a run that was never stopped.

Rows 1 and 2 of the table in README.md, for one process and two. EASYLM_MLING_KILLS is how many moments of each kind;
`make test-kills` takes 50.
"""

import json
import os
import random
import signal
import time

import pytest
from processes import assert_same_bits, ends, outcome, printed, run, start

from easylm_mling.monitoring.metrics import TIMINGS

MOMENTS = int(os.environ.get("EASYLM_MLING_KILLS", 3))
SETTINGS = (
    "checkpoint.every_steps=2",
    f"train.budget_tokens={256 * (20 + 4 * MOMENTS)}",
    "train.spike_sigmas=6",
    "--wait-seconds=120",
)


def saving(run_dir) -> bool:
    return any("tmp" in p.name for p in run_dir.glob("checkpoints/*"))


def last_step(run_dir) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b'{"kind": "train"') if metrics.exists() else 0


def wait_for_a_moment(processes, run_dir, rng, in_a_save):
    """Some steps into this start: while the next save is under way, or while none is."""
    before, ahead, until = last_step(run_dir), rng.randint(1, 4), time.monotonic() + 180
    while all(p.poll() is None for p in processes) and time.monotonic() < until:
        if last_step(run_dir) >= before + ahead and saving(run_dir) == in_a_save:
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.04))


@pytest.mark.faults
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_again_and_again(tmp_path, count):
    run(tmp_path / "undisturbed", 1, *SETTINGS, seconds=1800)
    undisturbed = outcome(tmp_path / "undisturbed")
    rng, struck, starts, runs = random.Random(count), {"a step": 0, "a save": 0, "neither": 0}, 0, 0
    while min(struck["a step"], struck["a save"]) < MOMENTS:
        run_dir, codes = tmp_path / f"run{runs}", []
        while codes != [0] * count:
            processes = start(run_dir, count, *SETTINGS)
            starts += 1
            if killing := min(struck["a step"], struck["a save"]) < MOMENTS:
                before = last_step(run_dir)
                wait_for_a_moment(processes, run_dir, rng, struck["a save"] < struck["a step"])
                rng.choice(processes).kill()
            codes = ends(run_dir, processes, 1800 if not killing else 400)
            # The others: found out (85), were told by JAX (SIGABRT), or were done.
            assert set(codes) <= {0, 85, -signal.SIGKILL, -signal.SIGABRT}, printed(run_dir)
            if killing and -signal.SIGKILL in codes:
                # What a save leaves behind that was not done.
                where = "a save" if saving(run_dir) else "a step" if last_step(run_dir) > before else "neither"
                struck[where] += 1
                print(f"{count} processes: {struck}", flush=True)
        assert_same_bits(outcome(run_dir), undisturbed)
        assert_every_line_was_the_same(run_dir)
        runs += 1
    print(f"{count} processes: killed in {struck}; {starts} starts of {runs} runs, all bit for bit the undisturbed one")


def assert_every_line_was_the_same(run_dir):
    """Also the lines of steps that were done again after a kill."""
    first = {}
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # a kill cut it short
        if line["kind"] in ("train", "eval"):
            what = {k: v for k, v in line.items() if k not in TIMINGS}
            assert first.setdefault((line["kind"], line["step"]), what) == what
