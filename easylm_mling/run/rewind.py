"""Rewinds: going back to an older checkpoint and leaving out some batches, as one does by hand after a spike of the loss.

RUN/rewinds.jsonl lists what was done. A checkpoint counts the lines there were when it was saved, so a restore knows
whether batches are to be left out after it: then a kill in between, or the same command again, changes nothing.
"""

from rich.console import Console

from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.config import TrainConfig
from easylm_mling.distributed.agreement import broadcast, is_primary
from easylm_mling.errors import ConfigError
from easylm_mling.monitoring.console import say
from easylm_mling.monitoring.events import EventLog
from easylm_mling.monitoring.metrics import MetricsLog, read_lines
from easylm_mling.run.directory import RunDirectory


def rewind(train: TrainConfig, checkpoints: Checkpoints, run: RunDirectory, events: EventLog, console: Console):
    """Do what `train.rewind` asks for, unless it was the run's last rewind: set newer steps aside, and record it.

    Raises ConfigError if there is no such checkpoint. Collective.
    """
    to, skip = train.rewind, train.skip_batches
    if not to:
        return
    done = _past(run)[-1:]
    if broadcast(bool(done) and (done[0]["step"], done[0]["skip_batches"]) == (to, skip)):
        say(console, f"train.rewind={to}: the run did so before, and goes on")
        return
    steps = checkpoints.steps()
    if to not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"train.rewind={to}: there is no checkpoint of that step; there are: {there}")
    checkpoints.set_aside([step for step in steps if step > to], "rewound")
    if is_primary():
        with MetricsLog(run.rewinds_file) as past:
            past.write("rewind", to, skip_batches=skip, from_step=steps[-1])
        events.write("rewound", to, skip_batches=skip, from_step=steps[-1])
    say(console, f"rewound to step {to} from {steps[-1]}, leaving out {skip} batches")


def count_rewinds(run: RunDirectory) -> int:
    """The number of rewinds so far, for a checkpoint's info. Collective."""
    return broadcast(len(_past(run)))


def batches_to_skip(run: RunDirectory, step: int, info: dict) -> int:
    """The number of batches to leave out after the checkpoint of `step` with this info. Collective."""
    later = _past(run)[info.get("rewinds", 0) :]
    return broadcast(later[-1]["skip_batches"] if later and later[-1]["step"] == step else 0)


def batches_left_out(run: RunDirectory) -> int:
    """The number of batches that all rewinds together left out; 0 in any but the primary process."""
    return sum(line["skip_batches"] for line in _past(run))


def _past(run: RunDirectory) -> list[dict]:
    lines = read_lines(run.rewinds_file, "rewind") if is_primary() and run.rewinds_file.exists() else []
    return [line for line in lines if isinstance(line.get("skip_batches"), int)]
