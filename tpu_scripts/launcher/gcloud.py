"""Calls of gcloud: arguments as a list, never through a shell; an answer, whatever happens."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from typing import Callable, NamedTuple

_MISSING = "gcloud is not on the PATH: install the Google Cloud CLI, then `gcloud auth login`"
# What only a person can mend.
_FOR_A_PERSON = (
    "INVALID_ARGUMENT",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "unrecognized arguments",
    "gcloud auth login",
)
# What may be over by itself: a service or a network that is down, and capacity or quota that others hold.
_CODES_THAT_PASS = ("RESOURCE_EXHAUSTED", "INTERNAL:", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
_WORDS_THAT_PASS = (
    "capacity", "quota", "no answer within", "timed out", "timeout", "connection", "network is unreachable", "name resolution",
    "httperror 429", "httperror 5", "try again",
)  # fmt: skip
_SHOWN_CHARACTERS = 500
# A process that was killed may have left its pipe to another one.
_AFTER_KILL_SECONDS = 5


def for_a_person(text: str) -> bool:
    return any(x in text for x in _FOR_A_PERSON)


def may_pass(text: str) -> bool:
    return any(x in text for x in _CODES_THAT_PASS) or any(x in text.lower() for x in _WORDS_THAT_PASS)


class Answer(NamedTuple):
    code: int  # gcloud's exit code; -1: no answer in time, or no gcloud
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def why(self) -> str:
        """Its error in gcloud's own words, on one line."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        at = next((i for i, x in enumerate(lines) if x.startswith("ERROR")), len(lines) - 1)
        # What gcloud says of a program that it called is only that it failed; that one's last words stand before.
        if at > 0 and "exited with return code" in lines[at]:
            at -= 1
        words = " ".join(lines[max(0, at) :])
        return words[:_SHOWN_CHARACTERS] or f"exit code {self.code}"


class Gcloud:
    """Runs `gcloud ARGUMENTS --quiet`."""

    def __call__(self, *arguments: str, timeout: float = 120, stdin: str = "") -> Answer:
        command = ["gcloud", *arguments, "--quiet"]
        # A file, and no pipe: of a launcher that is killed while it fills a pipe, gcloud would upload the part, or nothing.
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode())
            given.seek(0)
            try:
                # A session of its own: Ctrl-C is for the launcher, and a time-out ends gcloud's children too.
                process = subprocess.Popen(
                    command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
                )
            except FileNotFoundError:
                return Answer(-1, "", _MISSING)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # What some workers said is worth having although another one did not.
            out, err = _killed(process)
            late = f"no answer within {timeout:g} seconds"
            return Answer(-1, out.decode(errors="replace"), f"{err.decode(errors='replace')}\n{late}".strip())
        finally:
            if process.poll() is None:
                _killed(process)
        return Answer(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))

    def interactive(self, *arguments: str) -> int:
        """With this terminal as its own; returns its exit code."""
        try:
            return subprocess.call(["gcloud", *arguments])
        except FileNotFoundError:
            print(f"error: {_MISSING}", file=sys.stderr)
            return 127


def _killed(process: subprocess.Popen) -> tuple[bytes, bytes]:
    """End a process and its children; returns what they had printed."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself
    try:
        return process.communicate(timeout=_AFTER_KILL_SECONDS)
    except subprocess.TimeoutExpired as late:
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
        return late.stdout or b"", late.stderr or b""


class Rehearsal:
    """In place of Gcloud for --dry-run: prints each command as a shell would take it, and does nothing.

    `answer` says what the happy road would have answered to the arguments.
    """

    def __init__(self, answer: Callable[[tuple[str, ...]], Answer]):
        self._answer = answer

    def __call__(self, *arguments: str, timeout: float = 120, stdin: str = "") -> Answer:
        print(shlex.join(["gcloud", *arguments, "--quiet"]))
        return self._answer(arguments)

    def interactive(self, *arguments: str) -> int:
        print(shlex.join(["gcloud", *arguments]))
        return 0
