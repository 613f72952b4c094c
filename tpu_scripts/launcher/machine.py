"""The queued resource of a run: what state it is in, and the two things done to it.

It bears the run's name and, as a label, its owner: a digest of the run's place in the bucket, so that it is known again
even when all else that was known of the run is lost. What bears another label, or none, is somebody else's, and is never
touched.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import NamedTuple

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


class Machine(NamedTuple):
    kind: str
    said: str  # by gcloud, for people
    hosts: int = 0


def owner_of(run: RunFile) -> str:
    return hashlib.sha256(run.url.encode()).hexdigest()[:16]


def look(gcloud, run: RunFile, owner: str | None = None) -> Machine:
    """An answer that is none, or one that is not understood, is UNKNOWN: wait."""
    answer = gcloud("compute", "tpus", "queued-resources", "describe", *_place(run), "--format=json")
    if not answer.ok:
        # A zone or a project that is not there is NOT_FOUND too, but has another name.
        gone = "NOT_FOUND" in answer.err and re.search(rf"(?<![-\w]){run.name}(?![-\w])", answer.err)
        return Machine(ABSENT if gone else UNKNOWN, "there is none" if gone else answer.why)
    try:
        answers = json.loads(answer.out)
        state = answers["state"]["state"]
        labels = answers["tpu"]["nodeSpec"][0]["node"].get("labels", {})
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Machine(UNKNOWN, "an answer of gcloud that this launcher does not understand")
    if labels.get("easylm-owner") != (owner or owner_of(run)):
        return Machine(FOREIGN, f"{run.name} in {run.zone} is {state}, and not of this run")
    if state != "ACTIVE":
        return Machine(_QUEUED.get(state, UNKNOWN), state + _reason(answers["state"]))
    return _node(gcloud, run)


def _reason(state: dict) -> str:
    """What Google gives as the reason of a state, to be put behind it; empty if it gives none."""
    data = state.get(f"{str(state['state']).lower()}Data")
    error = data.get("error") if isinstance(data, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f": {' '.join(str(message).split())[:500]}" if message else ""


def _node(gcloud, run: RunFile) -> Machine:
    answer = gcloud("compute", "tpus", "tpu-vm", "describe", *_place(run), "--format=json")
    if not answer.ok:
        return Machine(UNKNOWN, answer.why)
    try:
        node = json.loads(answer.out)
        state, hosts = node["state"], len(node["networkEndpoints"])
    except (ValueError, KeyError, TypeError):
        return Machine(UNKNOWN, "an answer of gcloud that this launcher does not understand")
    return Machine(_NODE.get(state, UNKNOWN), f"ACTIVE, {state}", hosts)


def specification(run: RunFile) -> list[str]:
    """The flags that say which machine is asked for; its type and software come first."""
    valid = [f"--valid-until-duration={run.valid_until}"] if run.valid_until else []
    machine = [f"--accelerator-type={run.type}", f"--runtime-version={run.runtime}"]
    return [*machine, *CAPACITY[run.capacity], *valid, *run.create_flags]


def create(gcloud, run: RunFile) -> Answer:
    """Ask for the machine. It comes later, if at all."""
    labels = f"--labels=easylm-run={run.name},easylm-owner={owner_of(run)}"
    return gcloud(
        "compute", "tpus", "queued-resources", "create", *_place(run), f"--node-id={run.name}", *specification(run), labels,
        timeout=300,
    )  # fmt: skip


def delete(gcloud, run: RunFile) -> Answer:
    """Only after `look` said that it is ours."""
    return gcloud("compute", "tpus", "queued-resources", "delete", *_place(run), "--force", "--async", timeout=300)


def _place(run: RunFile) -> list[str]:
    return [run.name, f"--zone={run.zone}", f"--project={run.project}"]
