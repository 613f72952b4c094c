"""Looks at a run, asks decide.py what to do, does it, and looks again: until what was asked for is reached."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Callable

from . import machine as m
from .bucket import Bucket, NoAnswer, State
from .decide import (
    CRASH,
    CREATE,
    DELETE,
    END_OTHERS,
    ENDED,
    FINISHED,
    REFUSE,
    RESTART,
    SET_UP,
    START,
    STOP,
    WAIT,
    WRONG,
    Action,
    Seen,
    decide,
    verdict,
)
from .pack import make_pack
from .records import newest_step, newest_train_line
from .run_file import RunFile, WrongInput, secret_values
from .workers import EXITED, LOST, Worker, Workers

# What is to be reached: a machine on which all workers are ready; a run that was started; a run that is done.
UP, STARTED, FINISHED_RUN = "up started finished".split()
_SAY_AGAIN_SECONDS = 900
_PROGRESS_SECONDS = 120


class Driver:
    """`say` prints a line for people; `sleep` is time.sleep, or nothing in a rehearsal."""

    def __init__(self, run: RunFile, gcloud, goal: str, say: Callable[[str], None], sleep: Callable[[float], None]):
        self.run, self.gcloud, self.goal, self.say, self.sleep = run, gcloud, goal, say, sleep
        self.bucket, self.workers = Bucket(gcloud, run.url), Workers(gcloud, run)
        self.state = State()
        self.seen: list[Worker] = []
        self.ended_since = 0.0
        self.refused = self.setups_failed = 0
        self.told, self.told_at = "", 0.0
        self.known = False  # whether gcloud has given any good answer yet

    def drive(self, take_over: bool, again: bool) -> int:
        """Returns 0 when the goal is reached, or somebody asked for a stop; 1 when the run was given up.

        Raises WrongInput for what only a person can mend.
        """
        secret_values(self.run)
        try:
            self.state = self.bucket.take(take_over)
            try:
                return self._prepared(again)
            finally:
                self.bucket.let_go(self.state)
        except NoAnswer as error:
            raise WrongInput(f"the bucket of {self.run.url} gives no answer: {error}") from None

    def _prepared(self, again: bool) -> int:
        if self.state.ended == "done" and not again:
            self.say("this run is done; to start it once more (after a change of its file, say) give --again")
            return self._remove()
        # Whoever starts a run again has looked at what went wrong.
        self.state.ended, self.state.crashes = "", 0
        self._upload()
        self.bucket.want("run")
        while True:
            try:
                code = self._turn()
            except NoAnswer as error:
                self._wait(f"the bucket gives no answer: {error}")
                code = None
            if code is not None:
                return code
            self.sleep(self.run.poll_seconds)

    def _turn(self) -> int | None:
        """Look and act once; an exit code if that was the last time."""
        if self._stopped():
            self.say("a stop was asked for; this launcher ends")
            return 0
        self.bucket.beat(self.state)
        action = decide(self._look(), self.run.settle_seconds)
        if action.what == WAIT:
            return self._waiting(action.why)
        return self._do(action)

    def _look(self) -> Seen:
        machine = m.look(self.gcloud, self.run, self.state.owner)
        if machine.kind == m.UNKNOWN and not self.known and any(x in machine.said for x in m.FOR_A_PERSON):
            raise WrongInput(machine.said)
        self.known |= machine.kind != m.UNKNOWN
        workers = self.workers.status() if machine.kind == m.READY else None
        self.seen = workers or []
        over = any(w.attempt == self.state.attempt and w.state in (EXITED, LOST) for w in self.seen)
        self.ended_since = (self.ended_since or time.time()) if over else 0.0
        lasted = time.time() - self.ended_since if over else 0.0
        return Seen(machine, workers, self.state.pack, self.state.attempt, lasted)

    def _stopped(self) -> bool:
        return self.bucket.read("launch/wanted") in ("stop", "down")

    def _do(self, action: Action) -> int | None:
        if action.what == REFUSE:
            raise WrongInput(
                f"{action.why}; it is left as it is. Choose another [run] name, or see what it is: gcloud compute tpus "
                f"queued-resources describe {self.run.name} --zone={self.run.zone} --project={self.run.project}"
            )
        if action.what == CREATE:
            return self._create()
        if action.what == DELETE:
            self._next_attempt()
            self._note(f"the machine is {action.why}: it is deleted, and asked for again")
            m.delete(self.gcloud, self.run)
        elif action.what == SET_UP:
            return self._set_up()
        elif action.what == START:
            return self._start()
        elif action.what == END_OTHERS:
            self._note(f"{action.why}: they are ended")
            self.workers.stop(30)
        elif action.what == ENDED:
            return self._ended()
        return None

    def _create(self) -> int | None:
        if self._stopped():
            return None
        self.state.machines += 1
        self.bucket.keep(self.state)
        answer = m.create(self.gcloud, self.run, self.state)
        if answer.ok:
            self.refused = 0
            self._note(f"asked for a {self.run.type} ({self.run.capacity}) in {self.run.zone}")
        elif m.for_a_person(answer):
            raise WrongInput(answer.why)
        elif "ALREADY_EXISTS" not in answer.err:
            self.state.machines -= 1
            self.refused += 1
            self._wait(f"no machine to be had: {answer.why}")
            self.sleep(self._backoff(self.refused))
        return None

    def _set_up(self) -> int | None:
        self._note(f"setting up {self._workers()} (minutes, on a new machine)")
        answer = self.workers.set_up(f"{self.run.url}/launch/pack-{self.state.pack}.tar.gz", self.state.pack)
        failed = [x for x in answer.out.splitlines() if x.startswith("easylm-setup ")]
        if failed:
            self.setups_failed += 1
            for line in failed[:20]:
                self.say(line)
            if self.setups_failed > self.run.max_crashes:
                return self._give_up(f"setting up failed {self.setups_failed} times: {failed[-1]}")
            self.sleep(self._backoff(self.setups_failed))
        elif not answer.ok:
            self._wait(f"setting up did not reach all workers: {answer.why}")
        return None

    def _start(self) -> int | None:
        if self.goal == UP:
            self.say(f"{self._workers()} ready; billed until `down`")
            return 0
        if self.state.started < self.state.attempt:
            self.state.started = self.state.attempt
            self._note(f"attempt {self.state.attempt} starts on {self._workers()}")
        self.workers.start(self.state.attempt)
        return None

    def _waiting(self, why: str) -> int | None:
        if why == "running" and self.goal == FINISHED_RUN:
            self._tell_progress()
            return None
        self._wait(why)
        if why != "running":
            return None
        if self.goal == STARTED:
            self.say(
                "nothing watches it now: `run --keep-alive` does, `status` and `logs` look, `down` ends it and its bill"
            )
        return 0

    def _tell_progress(self):
        """The trainer's newest step, now and then."""
        if self.told == "running" and time.time() - self.told_at < _PROGRESS_SECONDS:
            return
        self.told, self.told_at = "running", time.time()
        line = newest_train_line(self.bucket)
        rate = line.get("tokens_per_second")
        self.say(
            f"running: step {line['step']}, loss {line.get('loss')}" + (f", {rate:,.0f} tokens/s" if rate else "")
            if line
            else "running: no step yet (`logs` has what the workers say)"
        )

    def _ended(self) -> int | None:
        what, why = verdict(self.seen, self.state.attempt)
        if what == WRONG:
            # What has trained before is hardly wrong: storage may have been out of reach when it was read.
            what = CRASH if newest_step(self.bucket) else STOP
        if what == FINISHED:
            return self._finish()
        if what == RESTART:
            self._next_attempt()
            self._note(f"{why}; going on")
        elif what == CRASH:
            self._count_crash()
            if self.state.crashes > self.run.max_crashes:
                return self._give_up(f"{why}; {self.state.crashes} crashes in a row without a new step")
            self._next_attempt()
            self._note(f"{why} (crash {self.state.crashes} of {self.run.max_crashes} that are borne); going on")
            self.sleep(self._backoff(self.state.crashes))
        else:
            return self._give_up(why)
        return None

    def _count_crash(self):
        """One that came further than all before it is the first of its own."""
        step = newest_step(self.bucket)
        if step > self.state.best_step:
            self.state.crashes, self.state.best_step = 0, step
        self.state.crashes += 1

    def _finish(self) -> int | None:
        if self.run.after:
            self.say("done; running the run file's own script for after")
            answer = self.workers.after()
            if not answer.ok:
                self.setups_failed += 1
                self.say(f"the script failed: {answer.why}\n{answer.out[-2000:]}")
                if self.setups_failed > self.run.max_crashes:
                    return self._give_up("training is done, but the run file's own script for after fails")
                return None
        self.state.ended = "done"
        self._note("done")
        return self._remove()

    def _give_up(self, why: str) -> int:
        self.state.ended = why
        self._note(f"given up: {why}")
        self.say("`logs` has the last words of every worker. After a repair, `run` goes on from the newest checkpoint")
        if self.goal != FINISHED_RUN:
            self.say("the machine is kept, and billed until `down`")
            return 1
        self.say(
            f"the machine is kept for {self.run.keep_minutes:g} minutes, for a look ([policy] keep_minutes), then deleted"
        )
        until = time.time() + self.run.keep_minutes * 60
        while time.time() < until:
            self.sleep(min(self.run.poll_seconds, max(0.0, until - time.time())))
            if self._stopped():
                return 1
            self.bucket.beat(self.state)
        self._remove()
        return 1

    def _remove(self) -> int:
        """Delete the machine, if it is ours, and see that it is gone."""
        remove(self.gcloud, self.run, self.state.owner, self._wait, self.sleep)
        self.say("no machine is left, and nothing is billed but the bucket")
        return 0

    def _next_attempt(self):
        if self.state.started == self.state.attempt:
            self.state.attempt += 1

    def _upload(self):
        pack, data = make_pack(self.run)
        if pack == self.state.pack:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, f"pack-{pack}.tar.gz")
            with open(path, "wb") as file:
                file.write(data)
            answer = self.gcloud("storage", "cp", path, f"{self.run.url}/launch/pack-{pack}.tar.gz", timeout=600)
        if not answer.ok:
            raise NoAnswer(answer.why)
        self.state.pack = pack
        self._note(f"code and settings of this run: pack {pack}, {len(data) / 1e6:.1f} MB")

    def _workers(self) -> str:
        return f"{len(self.seen)} worker{'s' if len(self.seen) > 1 else ''}"

    def _backoff(self, times: int) -> float:
        return min(300.0, self.run.backoff_seconds * 2 ** min(times - 1, 10))

    def _note(self, text: str):
        """Say it, and keep it with the state."""
        self.told = text
        self.say(text)
        self.state.history.append([round(time.time()), text])
        self.bucket.keep(self.state)

    def _wait(self, why: str):
        """Said when it is new, and again now and then: waiting may cost money."""
        if why != self.told or time.time() - self.told_at > _SAY_AGAIN_SECONDS:
            self.told, self.told_at = why, time.time()
            self.say(f"waiting: {why}" if why != "running" else why)


def remove(gcloud, run: RunFile, owner: str, wait: Callable[[str], None], sleep: Callable[[float], None]):
    """Delete the run's machine and return when there is none. Raises WrongInput if what is there is not the run's."""
    while True:
        machine = m.look(gcloud, run, owner)
        if machine.kind == m.ABSENT:
            return
        if machine.kind == m.FOREIGN:
            raise WrongInput(f"{machine.said}; it is left as it is")
        if machine.kind in (m.UNKNOWN, m.GOING):
            wait(machine.said)
        else:
            wait(f"deleting the machine ({machine.said})")
            m.delete(gcloud, run)
        sleep(min(run.poll_seconds, 10))
