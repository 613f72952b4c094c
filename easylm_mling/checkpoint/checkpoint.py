"""Save and restore checkpoints of a run: one Orbax step holds everything that a resume needs.

    RUN/checkpoints/STEP/params     float32 parameters; of a run with `lora` the adapters
                        /average    with `train.ema`: the running average of `params`, as they are
                        /training   optimizer state and counters
                        /data       what the mixer had consumed, two int64 arrays (data/mixture.py, DataState)
                        /info       JSON: the resolved config, fingerprints of tokenizer and data, tokens consumed, digests
   /set-aside/checkpoint-STEP-...   what a resume took out of the way: damaged, or newer than a rewind. Never deleted

An imported checkpoint (`import-hf`) is a directory of the same form with step 0 and only `params` and `info`.
Nothing but this file and checkpoint/parameters.py knows Orbax; checkpoint/layout.py, reading.py and writing.py do without.
Orbax does not check what it restores: every leaf's digest (training/digests.py) is saved with the step and compared after
a restore.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from easylm_mling.checkpoint.best import best_steps
from easylm_mling.checkpoint.layout import checkpoints_folder, remove_unfinished, set_aside
from easylm_mling.checkpoint.parameters import storage_context
from easylm_mling.checkpoint.reading import check_stored, packed, read_data, read_strings, unpacked
from easylm_mling.distributed.agreement import all_agree, broadcast, is_multiprocess, is_primary
from easylm_mling.distributed.watchdog import Watchdog
from easylm_mling.errors import DamagedCheckpoint, NoUsableCheckpoint, UnknownFormat, one_line
from easylm_mling.storage.files import transport_errors
from easylm_mling.storage.object_store import Bucket, is_bucket
from easylm_mling.training.digests import differing, digests
from easylm_mling.training.state import TrainState

# Typed as Any: Orbax's annotations of its policies and options do not agree with one another.
_policies: Any = ocp.training.preservation_policies
_save_policies: Any = ocp.training.save_decision_policies
# Seconds before each further try to restore a step from a bucket: about four minutes in all.
_BUCKET_WAITS = (0.5, 0.5, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0, 60.0, 60.0)


class SaveResult(NamedTuple):
    """How the save of `step` ended, or began: `problem` is why it failed, "" if it did not."""

    step: int
    problem: str = ""
    begun: bool = True  # False: it failed before anything was written

    @property
    def ok(self) -> bool:
        return not self.problem


class Restored(NamedTuple):
    """A step's training state, data state and info; and which newer steps were damaged (step, what is wrong)."""

    step: int
    state: TrainState
    data: dict[str, np.ndarray]
    info: dict
    damaged: list[tuple[int, str]]


class _Best(_policies.PreservationPolicy):
    """Keeps the steps that an evaluation chose as the best."""

    def __init__(self, directory: str | Path):
        self._directory = directory

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        best = {*best_steps(self._directory).values()}
        return [c.step in best for c in checkpoints]


class Checkpoints:
    """The checkpoints of the run in `directory`. A context manager: leaving it waits for the save under way.

    A save holds all arrays a second time until everything is written. One that has not ended after `stuck_seconds` (0: never)
    ends the process with exit code 85, because Orbax itself waits for storage that is gone; `record_stuck` is then called,
    see Watchdog.
    """

    def __init__(
        self,
        directory: str | Path,
        keep_last: int = 2,
        keep_every_steps: int = 0,
        keep_best: bool = False,
        stuck_seconds: float = 0.0,
        record_stuck: Callable[[str, int], None] = lambda what, code: None,
    ):
        keep = [_policies.LatestN(keep_last)]
        if keep_every_steps:
            keep.append(_policies.EveryNSteps(keep_every_steps))
        if keep_best and not is_bucket(directory):
            keep.append(_Best(directory))
        for library in ("absl", "gcsfs"):
            logging.getLogger(library).setLevel(logging.ERROR)
        self._bucket = Bucket(str(directory)) if is_bucket(directory) else None
        self._directory, self.path = directory, checkpoints_folder(directory)
        stuck = f"a save to {self.path} has not ended in {stuck_seconds / 60:g} minutes (checkpoint.stuck_minutes)"
        self._watchdog = Watchdog(stuck_seconds, stuck, lambda: self._orbax.is_saving_in_progress(), record_stuck)
        self._keep = _policies.AnyPreservationPolicy(keep)
        self._stuck_seconds = stuck_seconds
        self._orbax = self._open()
        self._saving: int | None = None  # the step under way
        self._problem = ""  # of this process, with the step under way
        self.failed_in_a_row = 0

    def _open(self):
        return ocp.training.Checkpointer(
            str(self.path),
            context=storage_context(self._stuck_seconds / 2),
            save_decision_policy=_save_policies.FixedIntervalPolicy(1),
            preservation_policy=self._keep,
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        self._watchdog.__enter__()
        return self

    def __exit__(self, kind, *_):
        with closing(self._watchdog):
            # After an error the others may not come to where this process would wait for them.
            if kind is None or not is_multiprocess():
                ended = self.wait()
                self._orbax.close()
                if ended and not ended.ok and kind is None:
                    raise OSError(ended.problem)

    def steps(self) -> list[int]:
        return sorted(c.step for c in self._orbax.checkpoints)

    def save(
        self, state: TrainState, data: dict[str, np.ndarray], info: dict, *, problem: str = "", wait: bool = False
    ) -> SaveResult:
        """Save `state` as its step; returns once the device arrays are copied, or with `wait` once it is committed.

        `problem`: why this process could not write what must be on disk before the step, "" if it could. No process begins
        a save that another does not. Call `wait` before. Collective.
        """
        assert self._saving is None, "a save is under way"
        step = int(state.step)
        arrays = {**state.parts, "data": data}
        if problem := self._problem_before(sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)), problem):
            self.failed_in_a_row += 1
            return SaveResult(step, problem, begun=False)
        parts = {**arrays, "info": packed({**info, "digests": digests(arrays)})}
        self._saving = step
        self._watchdog.beat()
        with self._noting_problem():
            self._orbax.save_checkpointables_async(step, parts, force=True)
        return (self.wait() if wait else None) or SaveResult(step)

    def committed(self) -> int | None:
        """The step under way, if this process knows it to be committed. Neither waits nor looks at the storage."""
        if self._saving is None or self._problem or self._orbax.is_saving_in_progress():
            return None
        with self._noting_problem():
            self._orbax.wait()
        return None if self._problem else self._saving

    def wait(self) -> SaveResult | None:
        """Wait for the save under way; None if there is none. If one process failed, all have. Collective."""
        if self._saving is None:
            return None
        if not self._problem:
            with self._noting_problem():
                self._orbax.wait()
        step, problem, self._saving, self._problem = self._saving, self._problem, None, ""
        if all_agree(not problem):
            self.failed_in_a_row = 0
            return SaveResult(step)
        self.failed_in_a_row += 1
        # After a failed save the object itself is of no use.
        until = time.monotonic() + 30
        with suppress(OSError):  # out of reach; the next start removes them
            while is_primary() and time.monotonic() < until and remove_unfinished(self._directory):
                time.sleep(0.2)
        all_agree(True)
        self._orbax = self._open()
        return SaveResult(step, f"{self.path}: {problem or 'another process could not write its part'}")

    @contextmanager
    def _noting_problem(self) -> Iterator[None]:
        """Within it, a failed save becomes this process's problem; the others hear of it in `wait`."""
        try:
            yield
        except (ValueError, RuntimeError, OSError, *transport_errors()) as error:
            # What Orbax raises for a failed save depends on the storage.
            self._problem = one_line(error)

    def _problem_before(self, needed: int, problem: str) -> str:
        """Why a save of `needed` bytes cannot begin, the same text or at least a text in every process. Collective."""
        free = 1 << 62
        if is_primary() and not self._bucket and self.path.is_dir():
            try:
                free = shutil.disk_usage(self.path).free
            except OSError as error:
                problem = problem or one_line(error)
        if not all_agree(not problem):
            return problem or "another process could not write what goes with it"
        free = broadcast(free)
        if free >= needed * 1.02:
            return ""
        return f"{self.path}: a checkpoint takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free"

    def save_params(self, params: dict, info: dict):
        """Save parameters alone, as step 0."""
        info = info | {"digests": digests({"params": params})}
        self._orbax.save_checkpointables(0, {"params": params, "info": packed(info)}, force=True)

    def restore(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, np.ndarray], dict]:
        """The training state at `step`, placed as the abstract `state` says (any mesh), the data state and the info.

        Raises Damaged, in every process, if it cannot be read or is not what was saved.
        """
        wanted = state.parts
        restored: Any = None
        wrong, data, info = "", {}, {}
        where = self.path / str(step)
        try:
            info = unpacked(read_strings(where), where)
            check_stored(where, wanted)
            data = read_data(where)
            restored = self._orbax.load_checkpointables(step, wanted)
        except UnknownFormat:
            raise  # the same in every process, and no damage
        except (KeyError, ValueError, FileNotFoundError) as error:
            wrong = " ".join(str(error).split())[-200:]
            if self._bucket:
                # If all of it is out of reach, that says nothing about the step: this raises.
                self._bucket.names()
        if not all_agree(not wrong):
            raise DamagedCheckpoint(wrong or "another process cannot read it")
        if leaf := differing(info.get("digests", {}), {**restored, "data": data}):
            raise DamagedCheckpoint(f"{leaf} is not what was saved")
        average = restored.get("average", {})
        return TrainState(params=restored["params"], average=average, **restored["training"]), data, info

    def restore_newest(self, state: TrainState) -> Restored | None:
        """The newest step that is what was saved; damaged newer ones are then set aside. None if there are no steps.

        Raises NoUsableCheckpoint, having changed nothing, if every step is damaged.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                restored = Restored(step, *self._restore_patiently(step, state), damaged)
            except DamagedCheckpoint as error:
                damaged.append((step, str(error)))
                continue
            self.set_aside([step for step, _ in damaged], "damaged")
            return restored
        if damaged:
            raise NoUsableCheckpoint(
                f"{self.path}: every checkpoint is damaged (step {damaged[0][0]}: {damaged[0][1]}); restore one from a backup, "
                "or start a new run_dir, with init_from for parameters that can be trusted"
            )
        return None

    def _restore_patiently(self, step: int, state: TrainState):
        """Try again before a step is called damaged, which costs all work since the one before. Collective.

        A local step has two tries. One in a bucket has more, with back-off: its answers may be cut short for minutes. Three
        tries that fail alike in every process are damage.
        """
        reasons: list[str] = []
        for seconds in _BUCKET_WAITS if self._bucket else (0.0,):
            try:
                return self.restore(step, state)
            except DamagedCheckpoint as error:
                reasons.append(str(error))
                if all_agree(len(reasons) > 2 and len(set(reasons[-3:])) == 1):
                    raise
                time.sleep(seconds)
        return self.restore(step, state)

    def set_aside(self, steps: list[int], why: str):
        """Rename steps out of the way, so that they can be saved again."""
        if not steps:
            return
        self._orbax.close()
        if is_primary():
            for step in steps:
                set_aside(self._directory, step, why)
        all_agree(True)
        self._orbax = self._open()
