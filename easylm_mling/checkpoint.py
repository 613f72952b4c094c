"""Checkpoints of a run: one Orbax step holds everything that a resume needs.

    RUN/checkpoints/STEP/params     float32 parameters
                        /training   optimizer state and counters
                        /data       what the mixer had consumed, two int64 arrays (data/mixture.py, DataState)
                        /info       JSON: the resolved config, fingerprints of tokenizer and data, tokens consumed

An imported checkpoint (`import-hf`) is a directory of the same form with step 0 and only `params` and `info`.
Nothing but this file knows Orbax. A step becomes visible only when it is whole (Orbax renames it as the last act).
"""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from easylm_mling.config import ConfigError
from easylm_mling.step import TrainState

# Typed as Any: Orbax's annotations of its policies and options do not agree with one another.
_policies: Any = ocp.training.preservation_policies
_save_policies: Any = ocp.training.save_decision_policies
FOLDER = "checkpoints"
# Bytes. Over 32 MiB, up to which malloc may keep what is freed.
_CHUNK = 64_000_000


def _context(bytes_at_a_time: int | None = None) -> ocp.Context:
    context = ocp.Context()
    context.memory_options.write_concurrent_bytes = bytes_at_a_time
    saving: Any = context.array.saving
    # Float noise does not compress: 7.5 % smaller files would cost more than half of the write speed.
    saving.use_compression = False
    saving.ocdbt_target_data_file_size = 400_000_000
    saving.scoped_storage_options_creator = _chunks
    return context


def _chunks(path, value):
    """How an array is cut in storage, so that an exporter reads a layer without its neighbours, and little at a time.

    A stacked parameter is cut into layers, and then, as any other array, into chunks of at most _CHUNK bytes.
    """
    stacked = "layers" in jax.tree_util.keystr(path) and getattr(value, "ndim", 0) > 1
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_CHUNK, shard_axes=(0,) if stacked else None)


class Checkpoints:
    """The checkpoints of the run in `directory`. Use as a context manager: leaving it waits for the save under way.

    With `bytes_at_a_time` (more than those of the largest array) a save holds no more than that besides the arrays;
    without, it holds all of them a second time until everything is written.
    """

    def __init__(
        self,
        directory: str | Path,
        keep_last: int = 2,
        keep_every_steps: int = 0,
        bytes_at_a_time: int | None = None,
    ):
        keep = [_policies.LatestN(keep_last)]
        if keep_every_steps:
            keep.append(_policies.EveryNSteps(keep_every_steps))
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.path = Path(directory).absolute() / FOLDER
        self._orbax = ocp.training.Checkpointer(
            str(self.path),
            context=_context(bytes_at_a_time),
            save_decision_policy=_save_policies.FixedIntervalPolicy(1),
            preservation_policy=_policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._orbax.close()

    def latest_step(self) -> int | None:
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState, data: dict[str, np.ndarray], info: dict):
        """Start to save `state` as its step; returns once the device arrays are copied. A failed save raises at the next one."""
        step = int(state.step)
        training = {k: getattr(state, k) for k in ("optimizer", "step", "skipped", "skipped_in_a_row")}
        parts = {"params": state.params, "training": training, "data": data, "info": _packed(info)}
        self._orbax.save_checkpointables_async(step, parts, force=True)

    def save_params(self, params: dict, info: dict):
        """Save parameters alone, as step 0."""
        self._orbax.save_checkpointables(0, {"params": params, "info": _packed(info)}, force=True)

    def wait(self):
        self._orbax.wait()

    def restore(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, np.ndarray], dict]:
        """The training state at `step`, placed as the abstract `state` says (any mesh), the data state and the info."""
        abstract = {k: getattr(state, k) for k in ("optimizer", "step", "skipped", "skipped_in_a_row")}
        got = self._orbax.load_checkpointables(
            step, {"params": state.params, "training": abstract, "data": None, "info": None}
        )
        data = {name: np.asarray(value) for name, value in got["data"].items()}
        return TrainState(params=got["params"], **got["training"]), data, _unpacked(got["info"])


def step_directory(directory: str | Path, step: int | None = None) -> Path:
    """The directory of `step` (default: the newest whole one) of a run or of an imported checkpoint.

    Raises ConfigError when there is none.
    """
    root = Path(directory).absolute() / FOLDER
    steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []
    if not steps:
        raise ConfigError(
            f"{directory}: no checkpoint here (expected {FOLDER}/STEP); name a run directory or an imported checkpoint"
        )
    if step is not None and step not in steps:
        raise ConfigError(f"{directory}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return root / str(steps[-1] if step is None else step)


def newest_step(directory: str | Path) -> int:
    """The step of the newest whole checkpoint, 0 if there is none."""
    root = Path(directory) / FOLDER
    return max((int(p.name) for p in root.iterdir() if p.name.isdigit()), default=0) if root.is_dir() else 0


def load_info(directory: str | Path, step: int | None = None) -> dict:
    """The JSON part of a checkpoint: `config` or `model`, `tokens`, `tokenizer`."""
    return _unpacked(ocp.load_checkpointables(str(step_directory(directory, step)), {"info": None})["info"])


def load_data_state(directory: str | Path, step: int | None = None) -> dict[str, np.ndarray]:
    """What the mixer had consumed, the arrays of a DataState by name; raises ConfigError for an imported checkpoint."""
    where = step_directory(directory, step)
    if not (where / "data").is_dir():
        raise ConfigError(f"{directory}: an imported checkpoint, not a run: nothing has been consumed")
    stored = ocp.load_checkpointables(str(where), {"data": None})["data"]
    return {name: np.asarray(value) for name, value in stored.items()}


def load_params(directory: str | Path, abstract: dict, step: int | None = None) -> dict:
    """Only the parameters of a checkpoint, placed as the abstract tree (shapes, dtypes, shardings) says."""
    where = step_directory(directory, step)
    with _context():
        return ocp.load_checkpointables(str(where), {"params": abstract})["params"]


def check_same_shapes(directory: str | Path, abstract: dict):
    """Raise ConfigError that names the first parameter whose shape is not the model's."""
    where = step_directory(directory)
    stored = ocp.checkpointables_metadata(str(where)).metadata["params"]
    expected = jax.tree_util.tree_leaves_with_path(abstract)
    found = {jax.tree_util.keystr(p): tuple(v.shape) for p, v in jax.tree_util.tree_leaves_with_path(stored)}
    for path, leaf in expected:
        name = jax.tree_util.keystr(path)
        if found.get(name) != tuple(leaf.shape):
            raise ConfigError(
                f"{where}: parameter {name} has shape {found.get(name)}, the model needs {tuple(leaf.shape)}; "
                "use the model config that the checkpoint was made with"
            )


def _packed(info: dict) -> dict:
    """As one string: Orbax sorts the keys of JSON, and the order of the sources means something."""
    return {"json": json.dumps(info)}


def _unpacked(stored: dict) -> dict:
    return json.loads(stored["json"])
