"""Everything that a run asked Google for, wherever: it is written down before it is asked for, and until it is seen to be gone.

An entry of the state's `requests` has zone, project, asked (Unix seconds) and flags (what `create` was told).
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Callable

from . import machine as m
from .gcloud import for_a_person, may_pass
from .run_file import RunFile, WrongInput
from .state import State

# Deletions that are refused, or have no effect, and looks that see nothing, one after the other.
_TRIES = 12
_SLOWEST = 30
_GOING_SECONDS = 3600


class StillThere(WrongInput):
    """Something that was to be deleted may be there, and be billed."""


class NotOurs(WrongInput):
    """What is there is somebody else's."""


def entry(run: RunFile) -> dict:
    flags = m.specification(run)
    return {"zone": run.zone, "project": run.project, "asked": round(time.time()), "flags": flags}


def at(run: RunFile, request: dict) -> RunFile:
    """The run, where that request was made."""
    return dataclasses.replace(run, zone=request["zone"], project=request["project"])


def _same_place(run: RunFile, request: dict) -> bool:
    return (request["zone"], request["project"]) == (run.zone, run.project)


def here(state: State, run: RunFile) -> dict | None:
    """What was asked for where the run file says."""
    return next((x for x in state.requests if _same_place(run, x)), None)


def elsewhere(state: State, run: RunFile) -> list[dict]:
    return [x for x in state.requests if not _same_place(run, x)]


def remember(state: State, run: RunFile):
    """The newest one of a place counts: there cannot be two of a name."""
    forget(state, run)
    state.requests.append(entry(run))


def forget(state: State, run: RunFile):
    state.requests = elsewhere(state, run)


def all_places(state: State | None, run: RunFile) -> list[RunFile]:
    """Where a machine of the run may be: where the run file says, and wherever it was asked for."""
    return [run, *(at(run, x) for x in (elsewhere(state, run) if state else ()))]


def asked_too_long(state: State, run: RunFile) -> bool:
    """Whether the run file's `valid_until` is over."""
    request, seconds = here(state, run), _seconds(run.valid_until)
    return bool(request and seconds and time.time() - request["asked"] >= seconds)


def _seconds(duration: str) -> int:
    """Of 12h, 1d6h or 90m; 0 if it is empty or written otherwise."""
    if not re.fullmatch(r"(\d+[smhd])+", duration):
        return 0
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([smhd])", duration))


def where(run: RunFile) -> str:
    return f"{run.name} in {run.zone} of {run.project}"


def remove(gcloud, run: RunFile, say: Callable[[str], None], sleep: Callable[[float], None], patient: bool = False):
    """Delete the run's machine in one place; returns when there is none.

    Raises StillThere, with Google's words, if that cannot be reached, and NotOurs. `patient`: what cannot be seen is waited for without
    end, as is right where nobody is there to try again.
    """
    tries = unseen = 0
    going = 0.0
    while True:
        machine = m.look(gcloud, run)
        if machine.kind == m.ABSENT:
            return
        if machine.kind == m.FOREIGN:
            raise NotOurs(f"{machine.said}; it is left as it is")
        pause = min(run.poll_seconds, 10)
        if machine.kind == m.UNKNOWN:
            unseen += 1
            most = _TRIES if may_pass(machine.said) else _TRIES // 4
            if not patient and (for_a_person(machine.said) or unseen > most):
                raise still_there(run, f"it cannot be seen: {machine.said}")
            say(f"{where(run)} cannot be seen: {machine.said}")
            pause *= min(2**unseen, _SLOWEST)
        elif machine.kind == m.GOING:
            going += pause
            if going > _GOING_SECONDS:
                raise still_there(run, f"it is {machine.said} for {going / 60:.0f} minutes")
            say(f"the machine is {machine.said}")
        else:
            tries += 1
            say(f"deleting the machine ({machine.said}) in {run.zone}")
            answer = m.delete(gcloud, run)
            if for_a_person(answer.err) or tries > _TRIES:
                raise still_there(run, answer.why if not answer.ok else f"it is still {machine.said}")
            if not answer.ok:
                say(f"not deleted yet: {answer.why}")
            if tries > 1:
                pause *= min(2**tries, _SLOWEST)
        sleep(pause)


def still_there(run: RunFile, why: str) -> StillThere:
    return StillThere(
        f"{where(run)} was not deleted, and may be billed: {why}; mend that and say `down` again, or delete it yourself: "
        f"gcloud compute tpus queued-resources delete {run.name} --zone={run.zone} --project={run.project} --force"
    )


def remove_all(gcloud, places: list[RunFile], say, sleep, patient: bool = False):
    """`remove` in each place, whatever becomes of the others. Raises StillThere with all that is left."""
    left, foreign = [], []
    for place in places:
        try:
            remove(gcloud, place, say, sleep, patient)
        except StillThere as error:
            left.append(str(error))
        except NotOurs as error:
            foreign.append(error)
    if left:
        raise StillThere("\n".join(left))
    if foreign:
        raise foreign[0]
