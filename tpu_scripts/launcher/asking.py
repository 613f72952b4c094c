"""Asks for the run's machine, and gives back what is not wanted any more. What was asked for is always written down."""

from __future__ import annotations

from typing import Callable

from . import machine as m
from . import requests
from .driving import Turn
from .gcloud import Answer, for_a_person, may_pass
from .run_file import RunFile, WrongInput
from .state import State

# Answers in a row that are errors of a kind that does not pass.
_ERRORS_BORNE = 5


class Asking:
    """`note` says a line and keeps it with the state, `wait` says why nothing is done, `rest` sleeps."""

    def __init__(self, run: RunFile, gcloud, turn: Turn, note: Callable, wait: Callable, rest: Callable):
        self.run, self.gcloud, self.turn = run, gcloud, turn
        self.note, self.wait, self.rest = note, wait, rest
        self.known = False  # whether gcloud has given any good answer yet
        self.errors = self.refused = 0
        self.failures = 0  # machines that came to nothing, one after the other
        self.told_later = False
        self.counted = False  # whether the one that is there is among them

    def withdrew_elsewhere(self, state: State) -> bool:
        """Give back what was asked for in another zone or project, before the run file was changed: it would be billed.

        Returns False when there is nothing of that kind. Raises WrongInput for a machine that may be training.
        """
        others = requests.elsewhere(state, self.run)
        if not others:
            return False
        place = requests.at(self.run, others[0])
        machine = m.look(self.gcloud, place)
        if machine.kind == m.READY:
            raise WrongInput(
                f"this run has a machine ({machine.said}) in {place.zone} of {place.project}, and its file now says "
                f"{self.run.zone} of {self.run.project}: `down` deletes it wherever it is, then `run` again; or put the file back"
            )
        if machine.kind not in (m.ABSENT, m.FOREIGN):
            self.note(f"what was asked for in {place.zone} of {place.project} ({machine.said}) is withdrawn")
            requests.remove(self.gcloud, place, self.wait, self.rest)
        requests.forget(state, place)
        self.turn.keep(state)
        return True

    def look(self, state: State) -> m.Machine:
        """Raises WrongInput for an error that no waiting mends, if nothing was ever seen, and for another kind of machine."""
        machine = m.look(self.gcloud, self.run)
        if machine.kind == m.UNKNOWN:
            self.errors += 0 if may_pass(machine.said) else 1
            if not self.known and (for_a_person(machine.said) or self.errors > _ERRORS_BORNE):
                raise WrongInput(f"{requests.where(self.run)} cannot be seen: {machine.said}")
            return machine
        self.known, self.errors = True, 0
        if machine.kind not in (m.ABSENT, m.FOREIGN):
            self._check_specification(state, machine)
        if machine.kind == m.READY:
            self.failures = 0
        return machine

    def _check_specification(self, state: State, machine: m.Machine):
        """What was asked for is what the run file says now; what still waits is asked for anew."""
        request, wanted = requests.here(state, self.run), m.specification(self.run)
        if request is None:
            # The state was lost: from now on it is known.
            requests.remember(state, self.run)
            self.turn.keep(state)
        elif machine.kind == m.READY and request["flags"][:2] != wanted[:2]:
            raise WrongInput(
                f"the machine that is there was asked for with {' '.join(request['flags'][:2])}, and the run file now says "
                f"{' '.join(wanted[:2])}: `down` deletes it, then `run` again; or put the file back"
            )
        elif machine.kind == m.READY and request["flags"] != wanted and not self.told_later:
            self.told_later = True
            self.note(
                f"the machine was asked for with {' '.join(request['flags'])}; what the run file says now is for the next one"
            )
        elif machine.kind == m.COMING and request["flags"] != wanted:
            self.note("the run file asks for another machine now: what was asked for is withdrawn")
            requests.remove(self.gcloud, self.run, self.wait, self.rest)
            requests.forget(state, self.run)

    def create(self, state: State) -> str:
        """Ask once. Returns why the run ends, if it does; raises WrongInput for what only a person can mend."""
        request = requests.here(state, self.run)
        if request is None or request["flags"] != m.specification(self.run):
            requests.remember(state, self.run)
        elif not self.failures and not self.refused:
            requests.remember(state, self.run)  # the time that it may take begins anew
        state.machines += 1
        self.turn.keep(state)
        answer = m.create(self.gcloud, self.run)
        if answer.ok:
            self.refused, self.counted = 0, False
            self._note_created(state)
        elif "ALREADY_EXISTS" not in answer.err:
            return self._not_created(state, answer)
        return ""

    def _note_created(self, state: State):
        try:
            self.note(f"asked for a {self.run.type} ({self.run.capacity}) in {self.run.zone}")
        except WrongInput:
            # This launcher slept, and its turn was over when it asked: `down` is not to be outlived.
            if self.turn.bucket.asked(state.heard) == "down":
                answer = m.delete(self.gcloud, self.run)
                if not answer.ok:
                    raise requests.still_there(self.run, answer.why) from None
            raise

    def _not_created(self, state: State, answer: Answer) -> str:
        state.machines -= 1
        self.refused += 1
        passes = may_pass(answer.err) and not for_a_person(answer.err)
        if for_a_person(answer.err) or (not passes and self.refused > _ERRORS_BORNE):
            # Google did not take it, so that nothing waits there.
            requests.forget(state, self.run)
            self.turn.keep(state)
            raise WrongInput(
                f"no {self.run.type} can be asked for in {self.run.zone} of {self.run.project}: {answer.why}"
            )
        if requests.asked_too_long(state, self.run):
            return f"no machine was to be had within [machine] valid_until = {self.run.valid_until} ({answer.why})"
        self.wait(f"no machine to be had: {answer.why}")
        self.rest(self.backoff(self.refused))
        return ""

    def lost(self, state: State, why: str) -> str:
        """The machine was taken away, or came to nothing: delete it. Returns why the run ends, if it does."""
        if not self.counted:
            self.failures, self.counted = self.failures + 1, True
        if why.startswith("FAILED"):
            if requests.asked_too_long(state, self.run):
                return f"no machine came within [machine] valid_until = {self.run.valid_until} ({why})"
            if self.failures > self.run.max_crashes and not may_pass(why):
                return f"{self.failures} machines in a row came to nothing; the last one is {why}"
        self.note(f"the machine is {why}: it is deleted, and asked for again")
        answer = m.delete(self.gcloud, self.run)
        if for_a_person(answer.err):
            raise WrongInput(f"{requests.where(self.run)} cannot be deleted, and holds quota: {answer.why}")
        if not answer.ok:
            self.wait(f"the machine is not deleted yet: {answer.why}")
        if self.failures > 1:
            self.rest(self.backoff(self.failures - 1))
        return ""

    def remove_all(self, state: State):
        """Delete all that was asked for, and see that it is gone. Raises StillThere."""
        requests.remove_all(self.gcloud, requests.all_places(state, self.run), self.wait, self.rest, patient=True)
        state.requests = []

    def replace(self):
        """Delete a machine that hangs, so that another one is asked for."""
        requests.remove(self.gcloud, self.run, self.wait, self.rest, patient=True)

    def backoff(self, times: int) -> float:
        return min(300.0, self.run.backoff_seconds * 2 ** min(times - 1, 10))
