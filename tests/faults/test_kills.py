"""kill -9 at random moments of steps and saves, again and again: the run that comes of it is one that was never stopped."""

import random
import signal
import time

import pytest
from processes import assert_same_bits, ends, outcome, printed, run, start

# Enough saves that most kills meet one.
SETTINGS = ("checkpoint.every_steps=1", "--wait-seconds=60")


def wait_for_a_moment(processes, run_dir, rng):
    """In half the cases a save is under way, in the others some step has been done or begun."""
    before = {p.name for p in run_dir.glob("checkpoints/*")}
    until = time.monotonic() + 120
    in_a_save = rng.random() < 0.5
    while all(p.poll() is None for p in processes) and time.monotonic() < until:
        new = {p.name for p in run_dir.glob("checkpoints/*")} - before
        if any("tmp" in name for name in new) if in_a_save else new:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05 if in_a_save else 0.5))


@pytest.mark.faults
@pytest.mark.parametrize("count, kills", [(1, 20), (2, 10)])
def test_killed_again_and_again(tmp_path, count, kills):
    run(tmp_path / "undisturbed", 1, *SETTINGS)
    undisturbed = outcome(tmp_path / "undisturbed")
    rng, killed, runs = random.Random(count), 0, 0
    while killed < kills:
        run_dir, codes = tmp_path / f"run{runs}", []
        while codes != [0] * count:
            processes = start(run_dir, count, *SETTINGS)
            if killed < kills:
                wait_for_a_moment(processes, run_dir, rng)
                rng.choice(processes).kill()
            codes = ends(run_dir, processes)
            killed += -signal.SIGKILL in codes
            # The others: found out (85), were told by JAX (SIGABRT), or were done.
            assert set(codes) <= {0, 85, -signal.SIGKILL, -signal.SIGABRT}, printed(run_dir)
        assert_same_bits(outcome(run_dir), undisturbed)
        runs += 1
    print(f"{killed} kills of {count} processes in {runs} runs")
