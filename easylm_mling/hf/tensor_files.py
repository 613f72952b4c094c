"""Files of safetensors: opened, and the headers of their tensors checked."""

import math
import os
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orjson
from safetensors import SafetensorError, safe_open

from easylm_mling.errors import ConfigError

# Each of these widens to float32 exactly.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class TensorFile:
    """An opened .safetensors file, as the library's `safe_open`; but whole rows are read, and not mapped.

    Mapped pages count as the process's memory, up to the whole file.
    """

    def __init__(self, path: Path):
        """Raises ConfigError for a damaged file."""
        self._path = path
        try:
            self._mapped = safe_open(path, framework="np")
        except SafetensorError as error:
            size = path.stat().st_size
            raise ConfigError(f"{path}: damaged or cut short at {size} bytes ({error}); download it again") from None
        # Stays open: another file that takes its name is not read in its place.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(self.read_at(0, 8).tobytes(), "little")
        self._header, self._data = orjson.loads(self.read_at(8, length).tobytes()), 8 + length

    def keys(self) -> list[str]:
        return self._mapped.keys()

    def get_tensor(self, name: str) -> np.ndarray:
        return self._mapped.get_tensor(name)

    def get_slice(self, name: str) -> "StoredTensor":
        first = self._data + self._header[name]["data_offsets"][0]
        return StoredTensor(self, first, self._mapped.get_slice(name))

    def read_at(self, first: int, count: int) -> np.ndarray:
        """Return bytes of the file, uint8 [count]; raises ConfigError where it has become shorter."""
        data = bytearray(count)
        view = memoryview(data)
        while view:  # a read gives 2 GiB at most
            taken = os.preadv(self._descriptor, [view], first)
            if not taken:
                raise ConfigError(f"{self._path}: cut short while it was read; download it again")
            first, view = first + taken, view[taken:]
        return np.frombuffer(data, np.uint8)


class StoredTensor:
    """A tensor of a .safetensors file, of which a part is read by its slices."""

    def __init__(self, file: TensorFile, first: int, mapped: Any):
        self._file, self._first, self._mapped = file, first, mapped

    def get_shape(self) -> list[int]:
        return self._mapped.get_shape()

    def get_dtype(self) -> str:
        return self._mapped.get_dtype()

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        """Read a part in the stored dtype; raises ConfigError where the file has become shorter."""
        (rows, *others), shape = index if isinstance(index, tuple) else (index,), self.get_shape()
        start, stop, step = rows.indices(shape[0])
        if step != 1 or any(part.indices(size) != (0, size, 1) for part, size in zip(others, shape[1:], strict=False)):
            return self._mapped[index]
        dtype, width = DTYPES[self.get_dtype()], math.prod(shape[1:])
        count = max(0, stop - start) * width * dtype.itemsize
        data = self._file.read_at(self._first + start * width * dtype.itemsize, count)
        return data.view(dtype).reshape(-1, *shape[1:])


def check_header(path: Path, name: str, header, shape: tuple[int, ...]):
    """Raise ConfigError unless a tensor has this shape, and a dtype that widens to float32 exactly."""
    stored, tag = tuple(header.get_shape()), header.get_dtype()
    if stored != shape:
        raise ConfigError(
            f"{path}: tensor {name} has shape {stored}, but config.json says {shape}; use its own config.json"
        )
    if tag not in DTYPES:
        raise ConfigError(f"{path}: tensor {name} has dtype {tag}; convert it to one of {', '.join(DTYPES)}")
