"""Saves of a run: what must be on disk before each, how each ended, and when failures end the run."""

import jax

from easylm_mling.checkpoint.base import Base
from easylm_mling.checkpoint.checkpoint import Checkpoints, SaveResult
from easylm_mling.config import RunConfig, to_tree
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import DataState
from easylm_mling.errors import TrainingStopped, one_line
from easylm_mling.run.data import RunData
from easylm_mling.run.directory import RunDirectory
from easylm_mling.run.monitor import Monitor
from easylm_mling.training.state import TrainState


def open_checkpoints(config: RunConfig, run: RunDirectory, monitor: Monitor) -> Checkpoints:
    """The checkpoints of the run, kept as the config says."""
    settings = config.checkpoint
    return Checkpoints(
        run.name,
        keep_last=settings.keep_last,
        keep_every_steps=settings.keep_every_steps,
        keep_best=settings.keep_best,
        stuck_seconds=settings.stuck_minutes * 60,
        record_stuck=monitor.stuck,
    )


class Saver:
    """Saves the state of a run with the whole run's data state, and reports how each save ended."""

    def __init__(
        self,
        config: RunConfig,
        checkpoints: Checkpoints,
        data: RunData,
        loader: Loader,
        monitor: Monitor,
        rewinds: int,
        base: Base | None = None,
    ):
        """`rewinds`: how many the run had (run/rewind.py). `base`: of the adapters that it trains."""
        self._config, self._checkpoints, self._data = config, checkpoints, data
        self._loader, self._monitor, self._rewinds, self._base = loader, monitor, rewinds, base
        # The save under way that is not yet reported: how long it held up the loop, in seconds, and its bytes.
        self._unreported: tuple[float, int] | None = None

    def report_committed(self):
        """Report the save under way once it is committed. Costs no I/O: the loop calls it at every step."""
        if self._unreported and (step := self._checkpoints.committed()) is not None:
            self._report(SaveResult(step))

    def save(self, state: TrainState, data_state: DataState, last: bool = False):
        """Start to save the step; the `last` one is waited for, and tried again if storage fails.

        A failed save is reported, and `checkpoint.max_failed` in a row, or a last one that cannot be saved, raise
        TrainingStopped. Collective.
        """
        step, checkpoints, most = int(state.step), self._checkpoints, self._config.checkpoint.max_failed
        with self._monitor.throughput.pausing() as pause:
            before = checkpoints.wait()
            self._report(before)
            if last and before == SaveResult(step):
                return
            result = self._attempt(state, data_state, last)
            while last and result.begun and not result.ok and checkpoints.failed_in_a_row < most:
                self._report(result)
                result = self._attempt(state, data_state, last)
        saved = jax.tree.leaves((state._replace(frozen={}), data_state))
        self._unreported = pause.seconds, sum(leaf.nbytes for leaf in saved)
        if last or not result.ok:
            self._report(result)
        if not result.ok and (last or checkpoints.failed_in_a_row >= most):
            raise TrainingStopped(
                f"{checkpoints.failed_in_a_row} checkpoints in a row could not be saved ({result.problem}); make room or repair "
                "the disk, then run again: it resumes from the newest checkpoint"
            )

    def _attempt(self, state: TrainState, data_state: DataState, wait: bool) -> SaveResult:
        step, config = int(state.step), self._config
        self._monitor.log.write("languages", step, languages=self._data.ledger.languages(data_state))
        info = {"config": to_tree(config), "tokens": config.step_tokens.at(step), "rewinds": self._rewinds}
        try:
            # Whoever resumes from the step does not read these records again, and finds its line in every log.
            self._loader.flush()
            self._data.keep(step, data_state)
            self._data.run.push()
            problem = ""
        except OSError as error:
            problem = one_line(error)
        info |= {**self._data.fingerprints, "estimates": self._data.estimates_digest}
        info["tokenizer_beside"] = self._data.beside
        if self._base:
            info["base"] = self._base._asdict()
        return self._checkpoints.save(state, data_state._asdict(), info, problem=problem, wait=wait)

    def _report(self, result: SaveResult | None):
        if result and result.ok and self._unreported:
            self._monitor.saved(result.step, *self._unreported)
        elif result and not result.ok:
            self._monitor.save_failed(result.step, result.problem, self._checkpoints.failed_in_a_row)
        self._unreported = None
