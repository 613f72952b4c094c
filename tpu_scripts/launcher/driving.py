"""One launcher drives a run at a time.

Its turn is a term: it creates URL/launch/term-N, which only one of all that try can do, and N only grows. Who finds a term
after its own has lost its turn. A term's holder writes the state, and with it, now and then, that it lives.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
import uuid
from typing import Callable

from .bucket import Bucket, NoAnswer
from .run_file import WrongInput
from .state import State

# A launcher that has not said anything for so long is gone.
STALE_SECONDS = 600
_BEAT_SECONDS = 60


class Turn:
    """This process's turn at a run."""

    def __init__(self, bucket: Bucket):
        self.bucket = bucket
        self.me = {"id": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid(), "place": _place()}

    def take(self, take_over: bool) -> State:
        """The run's state, driven by this process from now on. Raises WrongInput if another launcher drives it."""
        while True:
            state = self.bucket.state()
            fresh = state is None
            state = State(term=self._newest_term()) if state is None else state
            other = self._holder(state)
            if other and not take_over and not self._gone(other):
                raise WrongInput(
                    f"this run is driven by a launcher on {other['host']} (process {other['pid']}), last heard of "
                    f"{time.time() - other['beat']:.0f} seconds ago; stop that one, or take its place with --take-over"
                )
            if self.bucket.create(_name(state.term + 1), json.dumps({**self.me, "beat": time.time()})):
                break
            # Another one was faster: what it says of itself counts now.
            take_over = False
        state.term += 1
        if fresh:
            # Of a state that was lost, the logs still know how many attempts there were: none is written over.
            state.attempt = state.started = self._attempts_logged()
            state.attempt = max(1, state.attempt)
        self.keep(state)
        return state

    def keep(self, state: State):
        """Write the state. Raises NoAnswer if it could not be written, WrongInput when another launcher drives the run."""
        self._check_mine(state)
        state.launcher = {**self.me, "beat": time.time()}
        self.bucket.write("launch/state.json", state.text())

    def beat(self, state: State):
        """Say now and then that this launcher lives. Raises WrongInput when another took its place."""
        if time.time() - state.launcher["beat"] < _BEAT_SECONDS:
            self._check_mine(state)
        else:
            self.keep(state)

    def let_go(self, state: State):
        """At the end, however it came; without an answer the next launcher waits until this one's word is old."""
        try:
            self._check_mine(state)
            state.launcher = {}
            self.bucket.write("launch/state.json", state.text())
        except (NoAnswer, WrongInput):
            return

    def wait_for_driver(self, say: Callable[[str], None], sleep: Callable[[float], None]) -> bool:
        """Until no launcher drives the run; whether one did."""
        waited = False
        while (state := self.bucket.state()) and (other := self._holder(state)) and not self._gone(other):
            if not waited:
                say(f"waiting for the launcher on {other['host']} (process {other['pid']}) to end")
            waited = True
            sleep(2)
        return waited

    def _check_mine(self, state: State):
        if (text := self.bucket.read(_name(state.term + 1))) is not None:
            raise WrongInput(f"a launcher on {_claim(text).get('host')} has taken this one's place")

    def _holder(self, state: State) -> dict:
        """Who has the newest term; empty if that launcher has let go. Moves `state.term` to it."""
        other = _claim(json.dumps(state.launcher)) if state.launcher else {}
        while (text := self.bucket.read(_name(state.term + 1))) is not None:
            state.term, other = state.term + 1, _claim(text)
        return other

    def _newest_term(self) -> int:
        """One less than the newest, so that its holder is looked at."""
        names = [x.rpartition("-")[2] for x in self.bucket.list("launch") if x.startswith("launch/term-")]
        return max(0, max((int(x) for x in names if x.isdigit()), default=0) - 1)

    def _attempts_logged(self) -> int:
        names = [x.split("/")[1].rpartition("-")[2] for x in self.bucket.list("logs")]
        return max((int(x) for x in names if x.isdigit()), default=0)

    def _gone(self, other: dict) -> bool:
        if time.time() - other["beat"] > STALE_SECONDS:
            return True
        # The number of a process says something where it was given only.
        if (other["host"], other["place"]) != (self.me["host"], self.me["place"]):
            return False
        try:
            os.kill(other["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return other["pid"] == self.me["pid"]


def _name(term: int) -> str:
    return f"launch/term-{term}"


def _claim(text: str) -> dict:
    """Who began a term. What cannot be read was never a launcher that lives."""
    unknown = {"id": "", "host": "unknown", "pid": 0, "place": "", "beat": 0.0}
    try:
        values = json.loads(text)
        return values if all(type(values[k]) is type(v) for k, v in unknown.items()) else unknown
    except (ValueError, KeyError, TypeError):
        return unknown


def _place() -> str:
    """Tells computers of one name apart, and containers on one computer."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{uuid.getnode():x} {namespace}"
