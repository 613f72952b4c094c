"""The happy road of a run, for --dry-run: what gcloud would answer if all went well."""

from __future__ import annotations

import json
import re

from .gcloud import Answer, Rehearsal
from .machine import owner_of
from .run_file import RunFile
from .state import State

# Chips on a host; the number in a type counts cores of v4, v5p and tpu7x, two to a chip, and chips of the others.
_CHIPS_A_HOST = 4


def hosts(accelerator: str) -> int:
    kind, _, number = accelerator.rpartition("-")
    chips = int(number) // 2 if kind in ("v2", "v3", "v4", "v5p", "tpu7x") else int(number)
    # One host may hold 8 of the chips that are counted as chips.
    return 1 if chips <= 8 and kind in ("v5litepod", "v6e") else -(-chips // _CHIPS_A_HOST)


def rehearsal(run: RunFile, exists: bool) -> Rehearsal:
    """`exists`: the run was started before, as stop and down suppose."""
    there = State(started=1)
    seen = {"machine": exists, "pack": "", "attempt": 1 if exists else 0, "polls": 0}

    def answer(arguments: tuple[str, ...]) -> Answer:
        verb = " ".join(arguments[: 4 if arguments[0] == "compute" else 2])
        if verb == "storage cat":
            if exists and arguments[2].endswith("state.json"):
                return Answer(0, there.text(), "")
            return Answer(1, "", "matched no objects")
        if verb.endswith("queued-resources create"):
            seen["machine"] = True
        elif verb.endswith("queued-resources delete"):
            seen["machine"] = False
        elif not seen["machine"] and verb.endswith("describe"):
            return Answer(1, "", f"NOT_FOUND: {run.name}")
        elif verb.endswith("queued-resources describe"):
            node = {"node": {"labels": {"easylm-owner": owner_of(run)}}}
            return Answer(0, json.dumps({"state": {"state": "ACTIVE"}, "tpu": {"nodeSpec": [node]}}), "")
        elif verb.endswith("tpu-vm describe"):
            return Answer(0, json.dumps({"state": "READY", "networkEndpoints": [{}] * hosts(run.type)}), "")
        elif verb.endswith("tpu-vm ssh"):
            return Answer(0, _workers(arguments, seen, hosts(run.type)), "")
        return Answer(0, "", "")

    return Rehearsal(answer)


def _workers(arguments: tuple[str, ...], seen: dict, count: int) -> str:
    command = next(x for x in arguments if x.startswith("--command="))
    if found := re.search(r"worker_setup\.sh \S+ (\w+)", command):
        seen["pack"] = found[1]
    elif found := re.search(r"worker_run\.sh start (\d+)", command):
        seen["attempt"] = int(found[1])
    elif "worker_run.sh status" in command and seen["attempt"]:
        seen["polls"] += 1
    # Seen once while it trains, and then done.
    state = "idle" if not seen["attempt"] else "running" if seen["polls"] < 2 else "exited"
    code = 0 if state == "exited" else "-"
    line = f"pack={seen['pack']} attempt={seen['attempt']} state={state} code={code}\n"
    return "".join(f"easylm-worker {n} {line}" for n in range(count))
