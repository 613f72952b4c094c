"""kill -9 at random moments of a run with adapters and their running average: what comes of it is a run that was never stopped."""

import random

import pytest
from processes import assert_same_bits, ends, outcome, printed, run, start, wait_for_step

from easylm_mling.checkpoint.reading import load_info

KILLS = 3


@pytest.mark.faults
@pytest.mark.long
def test_adapters_killed_again_and_again(tmp_path):
    run(tmp_path / "base", 1, seconds=600)
    settings = (
        f"init_from={tmp_path / 'base'}",
        "lora.rank=4",
        "lora.dropout=0.1",
        "train.ema.decay=0.9",
        "checkpoint.every_steps=2",
    )
    run(tmp_path / "undisturbed", 1, *settings, seconds=600)
    rng, codes, killed = random.Random(3), [], 0
    while codes != [0]:
        processes = start(tmp_path / "run", 1, *settings)
        if killed < KILLS:
            wait_for_step(processes, tmp_path / "run", 3 * killed + rng.randint(1, 3))
            processes[0].kill()
            killed += 1
        codes = ends(tmp_path / "run", processes, 600)
        assert codes in ([0], [-9]), printed(tmp_path / "run")
    assert killed == KILLS
    # The parameters that are compared are those of the base with the adapters added.
    a, b = outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed")
    assert len([line for line in b[0] if "gradient_norm" in line]) == 10
    assert_same_bits(a, b)
    # Of every array of the state, the average among them.
    ours, theirs = (load_info(tmp_path / name)["digests"] for name in ("run", "undisturbed"))
    assert ours == theirs and any(name.startswith("['average']") for name in ours)
