"""What the launcher knows between its calls, all of it in the run's bucket, so that any laptop can go on.

URL/launch/state.json   which queued resource is this run's, attempts, crashes; written by the one launcher that drives
URL/launch/wanted       run, stop or down: what was asked last; written by the verbs
URL/launch/pack-D.tar.gz  what the workers get (pack.py)
URL/logs/               what worker_run.sh sends
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field, fields

from .gcloud import Answer
from .run_file import WrongInput

# A launcher that has not said anything for so long is gone.
STALE_SECONDS = 600
_BEAT_SECONDS = 60
_KEPT_EVENTS = 100


class NoAnswer(RuntimeError):
    """The bucket could not be asked; it may be there, and hold anything."""


@dataclass
class State:
    """`owner` is the label of what this run made. `attempt` is the one that is to run now, `started` the last begun."""

    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    attempt: int = 1
    started: int = 0
    pack: str = ""
    crashes: int = 0  # in a row, without a new step
    best_step: int = 0
    machines: int = 0  # asked for so far
    ended: str = ""  # done, or why not; empty: under way
    launcher: dict = field(default_factory=dict)  # who drives: id, host, pid, beat (Unix seconds)
    history: list = field(default_factory=list)  # [Unix seconds, what happened]


class Bucket:
    """`gcloud` is Gcloud or a Rehearsal."""

    def __init__(self, gcloud, url: str):
        self.gcloud, self.url = gcloud, url
        self._me = {"id": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}

    def read(self, name: str, last_bytes: int = 0) -> str | None:
        """An object's text (its end); None if there is none. Raises NoAnswer."""
        tail = [f"--range=-{last_bytes}"] if last_bytes else []
        answer = self.gcloud("storage", "cat", f"{self.url}/{name}", *tail)
        if answer.ok:
            return answer.out
        if not_there(answer):
            return None
        raise NoAnswer(answer.why)

    def write(self, name: str, text: str, only_new: bool = False) -> Answer:
        """Whole or not at all."""
        new = ["--if-generation-match=0"] if only_new else []
        return self.gcloud("storage", "cp", "-", f"{self.url}/{name}", *new, stdin=text)

    def want(self, what: str):
        """Write down what was asked for: run, stop or down. Raises NoAnswer."""
        answer = self.write("launch/wanted", what)
        if not answer.ok:
            raise NoAnswer(answer.why)

    def list(self, name: str) -> list[str]:
        """The objects below a folder, as names below the run's URL."""
        answer = self.gcloud("storage", "ls", "--recursive", f"{self.url}/{name}/")
        if not answer.ok and not not_there(answer):
            raise NoAnswer(answer.why)
        found = [x for x in answer.out.splitlines() if x.startswith(self.url) and not x.endswith((":", "/"))]
        return sorted(x[len(self.url) + 1 :] for x in found)

    def state(self) -> State | None:
        text = self.read("launch/state.json")
        if text is None:
            return None
        try:
            found = json.loads(text)
            return State(**{f.name: found[f.name] for f in fields(State) if f.name in found})
        except (ValueError, TypeError) as error:
            raise WrongInput(
                f"{self.url}/launch/state.json is not one of ours ({error}); choose another name or bucket"
            ) from None

    def take(self, take_over: bool) -> State:
        """This run's state, driven by this process from now on. WrongInput if another launcher drives it."""
        state = self.state()
        if state is None:
            state = State(launcher={**self._me, "beat": time.time()})
            answer = self.write("launch/state.json", _text(state), only_new=True)
            if not answer.ok:
                raise NoAnswer(f"{self.url}/launch/state.json cannot be written: {answer.why}")
            return state
        other = state.launcher
        if other and not take_over and not self._gone(other):
            raise WrongInput(
                f"this run is driven by a launcher on {other['host']} (process {other['pid']}), last heard of "
                f"{time.time() - other['beat']:.0f} seconds ago; stop that one, or take its place with --take-over"
            )
        self.keep(state)
        return state

    def keep(self, state: State):
        """Raises NoAnswer if it could not be written."""
        state.launcher, state.history = {**self._me, "beat": time.time()}, state.history[-_KEPT_EVENTS:]
        answer = self.write("launch/state.json", _text(state))
        if not answer.ok:
            raise NoAnswer(answer.why)

    def beat(self, state: State):
        """Say now and then that this launcher lives. Raises WrongInput when another took its place."""
        if time.time() - state.launcher["beat"] < _BEAT_SECONDS:
            return
        found = self.state()
        if found and found.launcher and found.launcher["id"] != self._me["id"]:
            raise WrongInput(f"a launcher on {found.launcher['host']} has taken this one's place")
        self.keep(state)

    def let_go(self, state: State):
        """At the end, however it came; without an answer the next launcher waits until this one's word is old."""
        try:
            found = self.state()
        except NoAnswer:
            return
        if found and found.launcher.get("id") == self._me["id"]:
            state.launcher = {}
            self.write("launch/state.json", _text(state))

    def wait_for_driver(self, sleep) -> bool:
        """Until no launcher drives the run; whether one did."""
        waited = False
        while (state := self.state()) and state.launcher and not self._gone(state.launcher):
            waited = True
            sleep(2)
        return waited

    def _gone(self, other: dict) -> bool:
        if time.time() - other["beat"] > STALE_SECONDS:
            return True
        if other["host"] != self._me["host"]:
            return False
        try:
            os.kill(other["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return other["pid"] == self._me["pid"]


def not_there(answer: Answer) -> bool:
    return "matched no objects" in answer.err


def _text(state: State) -> str:
    return json.dumps(asdict(state), indent=1) + "\n"
