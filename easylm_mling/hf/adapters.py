"""Adapters beside a stored base: read from a checkpoint, and added to the base's tensors one piece at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easylm_mling.checkpoint.base import open_base, stored_base, stored_lora
from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import check_part, load_info, open_store, stored_model
from easylm_mling.config import LoraConfig
from easylm_mling.errors import ConfigError
from easylm_mling.model.params import ADAPTERS, Parameter, adapter_table
from easylm_mling.training.digests import Pieces, leaf_name

if TYPE_CHECKING:
    from easylm_mling.hf.exporting import Tensor


def stored_adapters(step_dir: Path, part: str = "params") -> tuple[LoraConfig, list[tuple[Parameter, np.ndarray]]]:
    """Read all adapters of a checkpoint step: their settings, and the rows of the adapter table with float32 arrays.

    `part`: "params", or "average" for their running average.
    Raises ConfigError where there are none, and for what cannot be read or is not what was saved.
    """
    directory, step = step_dir.parent.parent, int(step_dir.name)
    info = load_info(directory, step)
    lora = stored_lora(info)
    if lora is None or stored_base(info) is None:
        raise ConfigError(f"{directory}: step {step} holds no adapters; it was trained without `lora`")
    check_part(step_dir, part)
    saved, arrays = info.get("digests", {}), []
    for p in adapter_table(stored_model(directory, step), lora):
        array = np.ascontiguousarray(open_store(step_dir, p.path, p.shape, part=part).read().result())
        digest = Pieces()
        digest.add(array.reshape(1, -1), 0, array.size)
        if str(digest) != saved.get(leaf_name(part, *p.path.split("."))):
            raise ConfigError(f"{step_dir}: parameter {p.path} is not what was saved; use another step")
        arrays.append((p, array))
    return lora, arrays


def base_directory(step_dir: Path, info: dict) -> Path | None:
    """Return the step of the base that the adapters in `step_dir` belong to; None if it holds all parameters.

    Raises ConfigError where the base is gone or has changed.
    """
    base = stored_base(info)
    if base is None:
        return None
    base = open_base(base, str(step_dir.parent.parent))
    return step_directory(base.init_from, base.step)


class MergedTensors:
    """Tensors of the base with their adapters added: computed in float32, and rounded once to `dtype`."""

    def __init__(
        self, base: Callable[["Tensor"], Iterator[np.ndarray]], step_dir: Path, dtype: np.dtype, part: str = "params"
    ):
        lora, arrays = stored_adapters(step_dir, part)
        self._base, self._dtype, self._scale = base, dtype, np.float32(lora.scale)
        self._factors = {p.path.removeprefix(f"{ADAPTERS}."): (p, array) for p, array in arrays}
        # Kind of a matrix -> the squares of the rounding error and of what the adapters change, summed.
        self._squares: dict[str, np.ndarray] = {}

    def __call__(self, tensor: "Tensor") -> Iterator[np.ndarray]:
        """Yield a tensor in flat pieces, in order, as `open_parameters` does."""
        name = tensor.parameter.path.rpartition(".")[2]
        found = self._factors.get(f"{tensor.parameter.path.partition('.')[0]}.{name}.a")
        if found is None or tensor.layer is None:
            for values in self._base(tensor):
                yield values.astype(self._dtype)
            return
        (p, a), (q, b) = found, self._factors[f"{tensor.parameter.path.partition('.')[0]}.{name}.b"]
        a, b = a[tensor.layer].reshape(p.hf_shape), b[tensor.layer].reshape(q.hf_shape)
        row = 0
        for values in self._base(tensor):
            rows = values.size // a.shape[1]
            assert rows * a.shape[1] == values.size, (tensor.name, values.size)
            change = (self._scale * (b[row : row + rows] @ a)).reshape(-1)
            exact = values + change
            rounded = exact.astype(self._dtype)
            error = rounded.astype(np.float32) - exact
            squares = np.array([np.dot(error, error), np.dot(change, change)], np.float64)
            self._squares[name] = self._squares.get(name, np.zeros(2)) + squares
            row += rows
            yield rounded

    def effects(self) -> list[str]:
        """Return for each kind of matrix how large the rounding error is beside what the adapters change, both in rms."""
        lines = []
        for name, (error, change) in self._squares.items():
            share = f"{(error / change) ** 0.5:.2g}" if change else "none: the adapters change nothing"
            lines.append(f"{name}: rounding error over the adapters' effect {share}")
        return lines
