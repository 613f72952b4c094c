"""The state machine: what is seen of a run -> the one next thing to do. Pure; drive.py looks, asks and does.

                         +-------------------- delete <---- SUSPENDED, FAILED, PREEMPTED
                         v                                      ^
    absent -- create --> coming -- wait --> ready -- set up --> start --> running -- wait --> all exited
                                              ^                                                  |
                                              +---- 42: at once; 1, 85, ...: within the budget --+-- 0: done
                                                                                                 +-- 3, or 2 at first: given up
What is not understood, or did not answer, is waited for: nothing is ever deleted on a guess. A worker that says nothing for
long, while no step is made, has an end too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from . import machine as m
from .machine import Machine
from .workers import EXITED, LOST, RUNNING, Worker

WAIT, CREATE, DELETE, SET_UP, START, END_OTHERS, ENDED, SILENT, REFUSE = (
    "wait create delete set-up start end-others ended silent refuse".split()
)

# Exit codes of the trainer, as easylm_mling/errors.py has them; it is not imported, for a laptop need not have what it needs.
DONE, WRONG_INPUT, NO_CHECKPOINT, PREEMPTED, STUCK = 0, 2, 3, 42, 85
FINISHED, RESTART, CRASH, WRONG, STOP = "finished restart crash wrong stop".split()


class Action(NamedTuple):
    what: str
    why: str = ""


class Seen(NamedTuple):
    """`workers` is None where they were not asked (no machine is ready)."""

    machine: Machine
    workers: list[Worker] | None
    pack: str
    attempt: int
    ended_for_seconds: float  # since the first worker was seen to have ended badly
    silent_for_seconds: float = 0.0  # since a worker did not answer, and no new step was made


def decide(seen: Seen, settle_seconds: float, silence_seconds: float = math.inf) -> Action:
    """The next action; its `why` is for people."""
    machine, workers = seen.machine, seen.workers
    if machine.kind == m.FOREIGN:
        return Action(REFUSE, machine.said)
    if machine.kind == m.ABSENT:
        return Action(CREATE)
    if machine.kind == m.LOST:
        return Action(DELETE, machine.said)
    if machine.kind != m.READY:
        return Action(WAIT, machine.said)
    if workers is None or len(workers) < machine.hosts:
        return _silence(machine, workers or [], seen.silent_for_seconds, silence_seconds)
    if any(w.attempt > seen.attempt for w in workers):
        return Action(
            REFUSE, f"a worker is at attempt {max(w.attempt for w in workers)}, which this launcher did not begin"
        )
    begun = [w for w in workers if w.attempt == seen.attempt]
    if not begun:
        return _before_start(workers, seen.pack)
    over = [w for w in begun if w.state in (EXITED, LOST)]
    if not over:
        return Action(START) if len(begun) < len(workers) else Action(WAIT, "running")
    # Those that never began have nothing to end.
    if len(over) == len(begun):
        return Action(ENDED)
    names = ", ".join(f"worker {w.number} ({'died' if w.code is None else w.code})" for w in sorted(over)[:5])
    if seen.ended_for_seconds < settle_seconds:
        return Action(WAIT, f"{names} ended; the others should end soon")
    return Action(END_OTHERS, f"{names} ended {seen.ended_for_seconds:.0f} seconds ago, and the others did not")


def _silence(machine: Machine, workers: list[Worker], lasted: float, most: float) -> Action:
    silent = sorted(set(range(machine.hosts)) - {w.number for w in workers})
    why = f"{len(workers)} of {machine.hosts} workers answer"
    if workers:
        why += f", not {', '.join(map(str, silent[:5]))}{', ...' if len(silent) > 5 else ''}"
    if lasted <= most:
        return Action(WAIT, why)
    return Action(SILENT, f"{why}, for {lasted / 60:.0f} minutes, in which no step was made")


def _before_start(workers: list[Worker], pack: str) -> Action:
    # What an attempt before this left running must end first, or the new one would not get the chips.
    if any(w.state == RUNNING for w in workers):
        return Action(END_OTHERS, "a worker still runs an attempt before this one")
    return Action(SET_UP) if any(w.pack != pack for w in workers) else Action(START)


def verdict(workers: list[Worker], attempt: int) -> tuple[str, str]:
    """What follows from how an attempt ended on all workers, and why: FINISHED, RESTART, CRASH, WRONG or STOP."""
    never = sorted(w.number for w in workers if w.attempt < attempt)
    workers = [w for w in workers if w.attempt == attempt]
    codes = {w.number: w.code for w in workers if w.state == EXITED}
    for code, what, why in (
        (NO_CHECKPOINT, STOP, "no checkpoint is usable"),
        (WRONG_INPUT, WRONG, "something in the config or the data is wrong, or out of reach"),
    ):
        at = sorted(n for n, c in codes.items() if c == code)
        if at:
            return what, f"worker {at[0]} ended with {code}: {why}"
    if never:
        return CRASH, f"worker {never[0]} never began"
    if len(codes) == len(workers) and set(codes.values()) == {DONE}:
        return FINISHED, "done"
    bad = sorted((n, c) for n, c in codes.items() if c not in (DONE, PREEMPTED, None))
    # 85 says that another worker is at fault: name that one if it is there.
    bad.sort(key=lambda x: (x[1] == STUCK, x[0]))
    lost = sorted(w.number for w in workers if w.state == LOST)
    if lost:
        return CRASH, f"worker {lost[0]} died without an exit code"
    if bad:
        return CRASH, f"worker {bad[0][0]} ended with {bad[0][1]}"
    return RESTART, "saved and ended by a signal"
