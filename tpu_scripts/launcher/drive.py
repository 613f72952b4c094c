"""Looks at a run, asks decide.py what to do, does it, and looks again: until what was asked for is reached."""

from __future__ import annotations

import math
import os
import tempfile
import time
from typing import Callable

from . import machine as m
from .asking import Asking
from .bucket import Bucket, NoAnswer
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
    SILENT,
    START,
    STOP,
    WAIT,
    WRONG,
    Action,
    Seen,
    decide,
    verdict,
)
from .driving import Turn
from .pack import make_pack
from .records import newest_step, newest_train_line
from .run_file import RunFile, WrongInput, secret_values
from .state import State
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
        self.turn = Turn(self.bucket)
        self.asking = Asking(run, gcloud, self.turn, self._note, self._wait, self._rest)
        self.state = State()
        self.seen: list[Worker] = []
        self.ended_since = self.silent_since = 0.0
        self.step_at_silence = 0
        self.setups_failed = 0
        self.kept_until = 0.0  # of a run that was given up, the time when its machine is deleted
        self.told, self.told_at = "", 0.0
        self.adopts = False  # whether the state was lost, so that the workers know more

    def drive(self, take_over: bool, again: bool) -> int:
        """Returns 0 when the goal is reached, or somebody asked for a stop; 1 when the run was given up.

        Raises WrongInput for what only a person can mend.
        """
        secret_values(self.run)
        try:
            # Read first: a `down` that comes while this launcher begins is not lost.
            heard = self.bucket.wanted()
            self.state = self.turn.take(take_over)
            self.state.heard = heard
            self.adopts = not self.state.history
            try:
                return self._prepared(again)
            finally:
                self.turn.let_go(self.state)
        except NoAnswer as error:
            raise WrongInput(f"the bucket of {self.run.url} gives no answer: {error}") from None

    def _prepared(self, again: bool) -> int:
        if self.state.ended == "done" and not again:
            self.say("this run is done; to start it once more (after a change of its file, say) give --again")
            return self._remove()
        # Whoever starts a run again has looked at what went wrong.
        self.state.ended, self.state.crashes = "", 0
        self._upload()
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
            return 0 if self.state.ended in ("", "done") else 1
        self.turn.beat(self.state)
        if self.state.ended:
            return self._over()
        if self.asking.withdrew_elsewhere(self.state):
            return None
        action = decide(self._look(), self.run.settle_seconds, self.run.silence_minutes * 60)
        if action.what == WAIT:
            return self._waiting(action.why)
        return self._do(action)

    def _look(self) -> Seen:
        machine = self.asking.look(self.state)
        workers = self.workers.status(machine.hosts) if machine.kind == m.READY else None
        self.seen = workers or []
        if self.workers.others:
            raise WrongInput(
                f"the workers are set up by the account {self.workers.others}, for which this one may not act there (no sudo): "
                "drive the run from that account. Nothing was changed"
            )
        if workers is not None and len(workers) == machine.hosts:
            self._adopt(workers)
        over = any(w.attempt == self.state.attempt and w.state in (EXITED, LOST) for w in self.seen)
        self.ended_since = (self.ended_since or time.time()) if over else 0.0
        lasted = time.time() - self.ended_since if over else 0.0
        silent = self._silent_for(workers is not None and len(workers) < machine.hosts)
        return Seen(machine, workers, self.state.pack, self.state.attempt, lasted, silent)

    def _adopt(self, workers: list[Worker]):
        """Where the state was lost, an attempt that runs is this run's, and no number is given twice."""
        if not self.adopts:
            return
        self.adopts = False
        newest = max(w.attempt for w in workers)
        if newest and newest >= self.state.started:
            self.state.attempt = self.state.started = newest
        else:
            self._next_attempt()

    def _silent_for(self, silent: bool) -> float:
        """Seconds for which a worker did not answer and training did not go on."""
        if not silent:
            self.silent_since = 0.0
            return 0.0
        if not self.silent_since:
            self.silent_since, self.step_at_silence = time.time(), newest_step(self.bucket)
        lasted = time.time() - self.silent_since
        if lasted > self.run.silence_minutes * 60 and (step := newest_step(self.bucket)) > self.step_at_silence:
            self.silent_since, self.step_at_silence = time.time(), step
            return 0.0
        return lasted

    def _stopped(self) -> bool:
        return bool(self.bucket.asked(self.state.heard))

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
            return self._end(self.asking.lost(self.state, action.why))
        if action.what == SET_UP:
            return self._set_up()
        if action.what == START:
            return self._start()
        if action.what == SILENT:
            return self._silent(action.why)
        if action.what == END_OTHERS:
            self._note(f"{action.why}: they are ended")
            self.workers.stop(30)
        elif action.what == ENDED:
            return self._ended()
        return None

    def _create(self) -> int | None:
        if self._stopped():
            return None
        # What ran on a machine before this one is over, however that went: no attempt's log is written over.
        self._next_attempt()
        return self._end(self.asking.create(self.state))

    def _end(self, why: str) -> int | None:
        """Ask no more, and leave nothing, if there is a reason."""
        if why:
            self.state.ended = why
            self._note(f"given up: {why}")
        return None

    def _silent(self, why: str) -> int | None:
        """Workers that hang are replaced with their machine; where none answers, the fault may be this computer's."""
        self.silent_since = 0.0
        why = f"{why}{f' ({self.workers.why})' if self.workers.why else ''}"
        self._count_crash()
        if not self.seen or self.goal != FINISHED_RUN or self.state.crashes > self.run.max_crashes:
            return self._give_up(why)
        self._next_attempt()
        self._note(f"{why}: the machine is deleted, and asked for again")
        self.workers.stop(self.run.stop_minutes * 60)
        self.asking.replace()
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
            self.sleep(self.asking.backoff(self.setups_failed))
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
            self.sleep(self.asking.backoff(self.state.crashes))
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

    def _give_up(self, why: str) -> int | None:
        self.state.ended = why
        stays = self.goal == FINISHED_RUN
        self.kept_until = time.time() + self.run.keep_minutes * 60 if stays else math.inf
        self._note(f"given up: {why}")
        self.say("`logs` has the last words of every worker. After a repair, `run` goes on from the newest checkpoint")
        if not stays:
            self.say("the machine is kept, and billed until `down`")
            return 1
        self.say(
            f"the machine is kept for {self.run.keep_minutes:g} minutes, for a look ([policy] keep_minutes), then deleted"
        )
        return None

    def _over(self) -> int | None:
        """What is left of a run that is done, or was given up; an exit code if that is all."""
        if self.kept_until == math.inf:
            return 1
        if time.time() < self.kept_until:
            return None
        done = self.state.ended == "done"
        self._remove()
        return 0 if done else 1

    def _remove(self) -> int:
        """Delete all that was asked for, and see that it is gone."""
        self.asking.remove_all(self.state)
        self.turn.keep(self.state)
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

    def _rest(self, seconds: float):
        """Sleep, and go on saying that this launcher lives."""
        self.sleep(seconds)
        self.turn.beat(self.state)

    def _note(self, text: str):
        """Say it, and keep it with the state."""
        self.told = text
        self.say(text)
        self.state.history.append([round(time.time()), text])
        self.turn.keep(self.state)

    def _wait(self, why: str):
        """Said when it is new, and again now and then: waiting may cost money."""
        if why != self.told or time.time() - self.told_at > _SAY_AGAIN_SECONDS:
            self.told, self.told_at = why, time.time()
            self.say(f"waiting: {why}" if why != "running" else why)
