"""The queued resource of a run: what state it is in, and the two things done to it.

It bears the run's name and, as a label, the owner that the run's state in the bucket names. What bears another label, or
none, is somebody else's, and is never touched.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from .bucket import State
from .gcloud import Answer
from .run_file import CAPACITY, RunFile

# What may be done next depends only on which of these it is.
UNKNOWN, ABSENT, FOREIGN, COMING, GOING, LOST, READY = "unknown absent foreign coming going lost ready".split()

_QUEUED = {
    "CREATING": COMING,
    "ACCEPTED": COMING,
    "WAITING_FOR_RESOURCES": COMING,
    "PROVISIONING": COMING,
    "SUSPENDING": GOING,
    "DELETING": GOING,
    # Neither ever comes back, and both hold quota until they are deleted.
    "SUSPENDED": LOST,
    "FAILED": LOST,
}
_NODE = {
    "READY": READY,
    "CREATING": COMING,
    "STARTING": COMING,
    "RESTARTING": COMING,
    "REIMAGING": COMING,
    "REPAIRING": COMING,
    "PREEMPTED": LOST,
    "TERMINATED": LOST,
    "DELETING": GOING,
}

# What create says that a person must mend; anything else may be over by itself.
FOR_A_PERSON = (
    "INVALID_ARGUMENT",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "unrecognized arguments",
    "gcloud auth login",
)


class Machine(NamedTuple):
    kind: str
    said: str  # by gcloud, for people
    hosts: int = 0


def look(gcloud, run: RunFile, owner: str) -> Machine:
    """An answer that is none, or one that is not understood, is UNKNOWN: wait."""
    answer = gcloud("compute", "tpus", "queued-resources", "describe", *_place(run), "--format=json")
    if not answer.ok:
        gone = "NOT_FOUND" in answer.err and run.name in answer.err
        return Machine(ABSENT if gone else UNKNOWN, "there is none" if gone else answer.why)
    try:
        found = json.loads(answer.out)
        state = found["state"]["state"]
        labels = found["tpu"]["nodeSpec"][0]["node"].get("labels", {})
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Machine(UNKNOWN, "an answer of gcloud that this launcher does not understand")
    if labels.get("easylm-owner") != owner:
        return Machine(FOREIGN, f"{run.name} in {run.zone} is {state}, and not of this run")
    if state != "ACTIVE":
        return Machine(_QUEUED.get(state, UNKNOWN), state)
    return _node(gcloud, run)


def _node(gcloud, run: RunFile) -> Machine:
    answer = gcloud("compute", "tpus", "tpu-vm", "describe", *_place(run), "--format=json")
    if not answer.ok:
        return Machine(UNKNOWN, answer.why)
    try:
        found = json.loads(answer.out)
        state, hosts = found["state"], len(found["networkEndpoints"])
    except (ValueError, KeyError, TypeError):
        return Machine(UNKNOWN, "an answer of gcloud that this launcher does not understand")
    return Machine(_NODE.get(state, UNKNOWN), f"ACTIVE, {state}", hosts)


def create(gcloud, run: RunFile, state: State) -> Answer:
    """Ask for the machine. It comes later, if at all."""
    valid = [f"--valid-until-duration={run.valid_until}"] if run.valid_until else []
    return gcloud(
        "compute", "tpus", "queued-resources", "create", *_place(run),
        f"--node-id={run.name}", f"--accelerator-type={run.type}", f"--runtime-version={run.runtime}",
        *CAPACITY[run.capacity], *valid, f"--labels=easylm-run={run.name},easylm-owner={state.owner}", *run.create_flags,
        timeout=300,
    )  # fmt: skip


def for_a_person(answer: Answer) -> bool:
    return any(text in answer.err for text in FOR_A_PERSON)


def delete(gcloud, run: RunFile) -> Answer:
    """Only after `look` said that it is ours."""
    return gcloud("compute", "tpus", "queued-resources", "delete", *_place(run), "--force", "--async", timeout=300)


def _place(run: RunFile) -> list[str]:
    return [run.name, f"--zone={run.zone}", f"--project={run.project}"]
