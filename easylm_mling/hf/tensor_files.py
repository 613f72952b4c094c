"""Files of safetensors: opened, and the headers of their tensors checked."""

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from easylm_mling.errors import ConfigError

# Each of these widens to float32 exactly.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def open_file(path: Path) -> safe_open:
    """Open a .safetensors file; raises ConfigError for a damaged one."""
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        size = path.stat().st_size
        raise ConfigError(f"{path}: damaged or cut short at {size} bytes ({error}); download it again") from None


def check_header(path: Path, name: str, header, shape: tuple[int, ...]):
    """Raise ConfigError unless a tensor has this shape, and a dtype that widens to float32 exactly."""
    stored, tag = tuple(header.get_shape()), header.get_dtype()
    if stored != shape:
        raise ConfigError(
            f"{path}: tensor {name} has shape {stored}, but config.json says {shape}; use its own config.json"
        )
    if tag not in DTYPES:
        raise ConfigError(f"{path}: tensor {name} has dtype {tag}; convert it to one of {', '.join(DTYPES)}")
