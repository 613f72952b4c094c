"""Calls of gcloud: arguments as a list, never through a shell; an answer, whatever happens."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from typing import Callable, NamedTuple

_MISSING = "gcloud is not on the PATH: install the Google Cloud CLI, then `gcloud auth login`"


class Answer(NamedTuple):
    code: int  # gcloud's exit code; -1: no answer in time, or no gcloud
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def why(self) -> str:
        """The line of its errors that says most."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return next((x for x in lines if x.startswith("ERROR")), lines[-1] if lines else f"exit code {self.code}")


class Gcloud:
    """Runs `gcloud ARGUMENTS --quiet`."""

    def __call__(self, *arguments: str, timeout: float = 120, stdin: str = "") -> Answer:
        command = ["gcloud", *arguments, "--quiet"]
        try:
            # A session of its own: Ctrl-C is for the launcher, and a time-out ends gcloud's children too.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except FileNotFoundError:
            return Answer(-1, "", _MISSING)
        try:
            out, err = process.communicate(stdin.encode(), timeout)
        except subprocess.TimeoutExpired:
            return Answer(-1, "", f"no answer within {timeout:g} seconds")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return Answer(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))

    def interactive(self, *arguments: str) -> int:
        """With this terminal as its own; returns its exit code."""
        try:
            return subprocess.call(["gcloud", *arguments])
        except FileNotFoundError:
            print(f"error: {_MISSING}", file=sys.stderr)
            return 127


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
