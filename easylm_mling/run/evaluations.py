"""What a run measures of itself while it trains: losses on held-out text, and scores on tasks, each at its own steps."""

from dataclasses import dataclass, field

from jax.sharding import Mesh

from easylm_mling.config import RunConfig
from easylm_mling.run.monitor import Monitor
from easylm_mling.run.task_scores import TaskScores
from easylm_mling.run.validation import Validation
from easylm_mling.training.state import TrainState

HELD_OUT, TASKS = "held-out text", "tasks"


@dataclass
class Evaluations:
    """Measures, and reports. It reads the parameters and changes nothing, so a run with it has the bits of one without."""

    config: RunConfig
    mesh: Mesh
    validation: Validation
    tasks: TaskScores | None
    monitor: Monitor
    _done: dict[str, int] = field(default_factory=dict)  # what was last measured after which step

    def due(self, step: int) -> list[str]:
        """Return what is to be measured after `step`."""
        every = {HELD_OUT: self.config.eval.every_steps, TASKS: self.config.eval.suite_every_steps}
        return [what for what in self._kinds if every[what] and step % every[what] == 0]

    def __call__(self, state: TrainState, due: list[str] | None = None):
        """Measure what is due (default: all) of the state, unless it was already measured at its step. Collective."""
        step = int(state.step)  # waits until it is done
        for what in self._kinds if due is None else due:
            if self._done.get(what) == step:
                continue
            with self.monitor.throughput.pausing() as pause:
                result = self._measure(what, state)
            told = self.monitor.scored if what == TASKS else self.monitor.evaluated
            told(step, result, pause.seconds)
            self._done[what] = step

    @property
    def _kinds(self) -> list[str]:
        return [HELD_OUT, TASKS] if self.tasks else [HELD_OUT]

    def _measure(self, what: str, state: TrainState) -> dict:
        if what == TASKS:
            assert self.tasks is not None
            return self.tasks(state.weights, self.mesh)
        average = {"ema": self.validation(state.averaged_weights)} if state.average else {}
        return self.validation(state.weights) | average
