"""The run's folder in the bucket, where all lies that any laptop needs to go on.

URL/launch/state.json   requests, attempts, crashes (state.py)
URL/launch/term-N       who drives since when (driving.py)
URL/launch/wanted       stop or down, and a name of its own for each time: what was asked last; written by the verbs
URL/launch/pack-D.tar.gz  what the workers get (pack.py)
URL/logs/               what worker_run.sh sends
"""

from __future__ import annotations

import secrets

from .gcloud import Answer
from .state import State, parse_state


class NoAnswer(RuntimeError):
    """The bucket could not be asked; it may be there, and hold anything."""


class Bucket:
    """`gcloud` is Gcloud or a Rehearsal."""

    def __init__(self, gcloud, url: str):
        self.gcloud, self.url = gcloud, url

    def read(self, name: str, last_bytes: int = 0) -> str | None:
        """An object's text (its end); None if there is none. Raises NoAnswer."""
        tail = [f"--range=-{last_bytes}"] if last_bytes else []
        answer = self.gcloud("storage", "cat", f"{self.url}/{name}", *tail)
        if answer.ok:
            return answer.out
        if not_there(answer):
            return None
        raise NoAnswer(answer.why)

    def write(self, name: str, text: str) -> None:
        """Write an object, whole or not at all. Raises NoAnswer."""
        answer = self.gcloud("storage", "cp", "-", f"{self.url}/{name}", stdin=text)
        if not answer.ok:
            raise NoAnswer(f"{self.url}/{name} cannot be written: {answer.why}")

    def create(self, name: str, text: str) -> bool:
        """Write an object if there is none of the name; returns whether this call did. Raises NoAnswer."""
        answer = self.gcloud("storage", "cp", "-", f"{self.url}/{name}", "--if-generation-match=0", stdin=text)
        if not answer.ok and not _is_there(answer):
            raise NoAnswer(f"{self.url}/{name} cannot be written: {answer.why}")
        return answer.ok

    def want(self, what: str):
        """Write down what was asked for: stop or down. Raises NoAnswer."""
        self.write("launch/wanted", f"{what} {secrets.token_hex(8)}")

    def wanted(self) -> str:
        """What was asked for last, as it was written; empty if nothing was. Raises NoAnswer."""
        return self.read("launch/wanted") or ""

    def asked(self, heard: str) -> str:
        """The verb that was asked for last, stop or down; empty if that is `heard` already. Raises NoAnswer."""
        wanted = self.wanted()
        return "" if wanted == heard else wanted.partition(" ")[0]

    def list(self, name: str) -> list[str]:
        """The objects below a folder, as names below the run's URL."""
        answer = self.gcloud("storage", "ls", "--recursive", f"{self.url}/{name}/")
        if not answer.ok and not not_there(answer):
            raise NoAnswer(answer.why)
        lines = [x for x in answer.out.splitlines() if x.startswith(self.url) and not x.endswith((":", "/"))]
        return sorted(x[len(self.url) + 1 :] for x in lines)

    def state(self) -> State | None:
        """None if nothing is known of the run. Raises NoAnswer, or WrongInput for a state that cannot be used."""
        text = self.read("launch/state.json")
        return None if text is None else parse_state(text, self.url)


def not_there(answer: Answer) -> bool:
    return "matched no objects" in answer.err


def _is_there(answer: Answer) -> bool:
    return "412" in answer.err or "pre-condition" in answer.err.lower() or "precondition" in answer.err.lower()
