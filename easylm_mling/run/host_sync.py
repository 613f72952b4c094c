"""Host synchronisation: which lanes a process owns, where its rows go, and what the processes of a run exchange at every step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easylm_mling.config import RunConfig
from easylm_mling.data.loader import Batch, Loader
from easylm_mling.data.mixture import DataState, whole_state
from easylm_mling.data.quarantine import Quarantine
from easylm_mling.distributed.agreement import is_multiprocess, is_primary
from easylm_mling.errors import ConfigError
from easylm_mling.model.sequence_shares import divided
from easylm_mling.model.sharding import batch_sharding, own_rows


def own_lanes(config: RunConfig, mesh: Mesh) -> range:
    """The lanes whose rows lie on this process's devices; processes that share rows have the same lanes.

    Raises ConfigError if a process would hold a part of a lane.
    """
    rows = own_rows(mesh, config.train.batch_size, config.mesh.sequence)
    per_lane = config.train.batch_size // config.lanes
    if rows.start % per_lane or rows.stop % per_lane:
        raise ConfigError(
            f"data.lanes={config.lanes}: {jax.process_count()} processes hold {len(rows)} rows of a batch each, which is no "
            f"whole number of lanes of {per_lane} rows; use fewer processes for this run (its lanes are fixed)"
        )
    return range(rows.start // per_lane, rows.stop // per_lane)


def place_batch(batch: Batch, mesh: Mesh, sequence: int) -> dict[str, jax.Array]:
    """Put this process's rows onto its devices, as global arrays: in shares where `mesh.sequence` divides rows."""
    place = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(place, v) for k, v in divided(batch, mesh, sequence).items()}


class Agreement(NamedTuple):
    """What all processes agree on at a step."""

    stop_request: int  # the largest of all (run/preemption.py)
    state: DataState | None  # consumed by the whole run; None before its first step


class HostSync:
    """Exchanges every process's stop request and data state at a step; the result is read a step later, without waiting.

    On CPU devices it waits for the step and for the result: there, independent programs run side by side, and two that use
    the same devices take each other's messages for their own.
    """

    def __init__(self, lanes: range):
        self._lanes = lanes
        devices = {d.process_index: d for d in reversed(jax.devices())}
        self._mesh = Mesh(np.array([devices[i] for i in sorted(devices)]), ("process",))
        self._each = NamedSharding(self._mesh, PartitionSpec("process"))
        self._copy = jax.jit(lambda x: x, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        self._waits = self._mesh.devices.flat[0].platform == "cpu"

    def start(self, stop_request: int, state: DataState, under_way: Any = None) -> Callable[[], Agreement]:
        """Start the exchange; call the result to wait for it. Collective.

        `state` is this process's own (data/mixture.py, own_state); `under_way` are the arrays of all that was launched before.
        """
        if not is_multiprocess():
            return lambda: Agreement(stop_request, state)
        own = state.lanes[self._lanes.start : self._lanes.stop]
        head = np.array([stop_request, self._lanes.start], np.int64)
        # JAX would make 32-bit numbers of 64-bit ones.
        message = np.concatenate([head, own.reshape(-1), state.languages.reshape(-1)]).view(np.uint32)
        if self._waits:
            jax.block_until_ready(under_way)
        with jax.set_mesh(self._mesh):
            gathered = self._copy(jax.make_array_from_process_local_data(self._each, message[None]))
        if self._waits:
            jax.block_until_ready(gathered)
        return lambda: self._read(np.asarray(gathered), state)

    def _read(self, gathered: np.ndarray, like: DataState) -> Agreement:
        messages = np.ascontiguousarray(gathered).view(np.int64)
        states = {}  # by first lane: processes that share rows have the same ones
        size = len(self._lanes) * like.lanes[0].size
        for (start, *_), numbers in zip(messages[:, 1:2].tolist(), messages[:, 2:], strict=True):
            lanes = np.zeros_like(like.lanes)
            lanes[start : start + len(self._lanes)] = numbers[:size].reshape(len(self._lanes), *lanes.shape[1:])
            states[start] = DataState(lanes, numbers[size:].reshape(like.languages.shape))
        return Agreement(int(messages[:, 0].max()), whole_state(list(states.values())))


def own_quarantine(path: Path, sources: list[str], state: DataState | None) -> Path:
    """This process's list of bad records: `path` itself, or a file beside it.

    The primary process drops entries of processes that this run no longer has, if they are ahead of `state`: their
    records will be read again.
    """
    if is_primary():
        for other in path.parent.glob(f"{path.stem}-of-process-*{path.suffix}"):
            number = other.stem.rpartition("-")[2]
            if number.isdigit() and int(number) >= (jax.process_count() if is_multiprocess() else 1):
                Quarantine(other, sources, state and state.lanes)
        return path
    return path.with_name(f"{path.stem}-of-process-{jax.process_index()}{path.suffix}")


def next_on_all_hosts(loader: Loader):
    """The loader's next (batch, state); None if it has ended on any host, so that all end at the same step. Collective."""
    item = next(loader, None)
    if is_multiprocess() and any(order.epochs is not None for order in loader.orders):
        # A step's worth of waiting for one bit, only in runs whose sources can be used up.
        if bool(np.any(multihost_utils.process_allgather(np.array(item is None)))):
            return None
    return item
