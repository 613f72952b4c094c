"""The replay check: a step that is done again must give the same bits, by digests of the state in metrics.jsonl.

A bit that flips in memory and a core that computes wrong leave no other trace. `train.digest_every_steps` says at which
steps the digest of each leaf of the state is recorded. Steps that are done again, after a kill or a rewind, are compared.
"""

from dataclasses import asdict
from hashlib import blake2b

import jax
import orjson
from jax.sharding import Mesh

from easylm_mling.config import RunConfig, step_settings
from easylm_mling.distributed.agreement import all_agree, is_primary
from easylm_mling.errors import TrainingStopped
from easylm_mling.model.sharding import axis_sizes
from easylm_mling.monitoring.metrics import MetricsLog, read_lines
from easylm_mling.run.data import RunData
from easylm_mling.run.rewind import batches_left_out
from easylm_mling.training.digests import digests
from easylm_mling.training.state import TrainState


class ReplayCheck:
    """Records digests of the state, and compares them with those in the run's metrics."""

    def __init__(self, config: RunConfig, mesh: Mesh, data: RunData, log: MetricsLog):
        self._every, self._log, self._program = config.train.digest_every_steps, log, ""
        self._before: dict[int, dict[str, str]] = {}
        if self._every and is_primary():
            self._program = _program(config, mesh, {"left_out": batches_left_out(data.run), **data.fingerprints})
            for line in read_lines(data.run.metrics_file, "digests"):
                if line.get("program") == self._program and isinstance(line.get("digests"), dict):
                    self._remember(line["step"], line["digests"])

    def _remember(self, step: int, recorded: dict[str, str]):
        if self._before.get(step, recorded) != recorded:
            # All that was computed from there on is in doubt.
            self._before = {known: value for known, value in self._before.items() if known < step}
        self._before[step] = recorded

    def check(self, step: int, state: TrainState):
        """Record the digests of the state after `step`, if it is due. Collective.

        Raises TrainingStopped, in every process, that names the first leaf which is not what it was the last time.
        """
        if not self._every or step % self._every:
            return
        now = digests(state._asdict())
        before = self._before.get(step, now)
        self._log.write("digests", step, program=self._program, digests=now)
        leaf = next((name for name in now if before.get(name) != now[name]), "")
        if not all_agree(not leaf):
            raise TrainingStopped(
                f"step {step}, done again, gave other bits than before, first in {leaf or '... (process 0 says where)'}: memory or "
                "a chip is at fault, now or then. Run again, on another host if you can: two in a row that agree go on"
            )


def _program(config: RunConfig, mesh: Mesh, batches: dict) -> str:
    """A digest of all that a step's bits may depend on: only steps of the same program are compared."""
    parts = {name: asdict(getattr(config, name)) for name in ("model", "data", "optimizer")}
    if config.lora:
        parts["lora"] = asdict(config.lora)
    device = mesh.devices.flat[0]
    # On the CPU a process that joined others, or itself, sums in another order than one on its own.
    where = {
        "mesh": axis_sizes(mesh, config.mesh.sequence),
        "device": device.device_kind,
        "joined": jax.distributed.is_initialized(),
    }
    whole = {**parts, "train": step_settings(config.train), **where, "jax": jax.__version__, "batches": batches}
    return blake2b(orjson.dumps(whole, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()
