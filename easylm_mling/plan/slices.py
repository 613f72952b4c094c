"""The TPU slices that a run can be planned for: names, shapes, and the chip of each.

Source: cloud.google.com/tpu/docs. The number in a v4, v5p or tpu7x name counts TensorCores, two a chip.
"""

import math
import re
from dataclasses import dataclass, replace

from easylm_mling.config import RunConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hardware import CHIPS, Chip


@dataclass(frozen=True)
class Slice:
    """`count` slices of one shape; several are joined by the data-centre network."""

    name: str
    chip: Chip
    shape: tuple[int, int, int]
    host: tuple[int, int, int]  # chips of one host along each axis
    count: int = 1

    @property
    def chips(self) -> int:
        """Chips of all `count` slices."""
        return self.count * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices of all `count` slices."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Hosts of all `count` slices."""
        return self.chips // math.prod(self.host)


# The number in a slice's name: its shape. v4, v5p and tpu7x are cut from a three-dimensional torus, the others from a plane.
_CUBES = {
    8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8), 512: (4, 8, 8),
}  # fmt: skip
_PLANES = {4: (2, 2, 1), 8: (2, 4, 1), 16: (4, 4, 1), 32: (4, 8, 1), 64: (8, 8, 1), 128: (8, 16, 1), 256: (16, 16, 1)}
_SHAPES = {"v4": _CUBES, "v5p": _CUBES, "v5e": _PLANES, "v6e": _PLANES, "tpu7x": _CUBES}


def _named(chip: Chip, number: int, shape: tuple[int, int, int]) -> Slice:
    # A plane of eight chips hangs on one host; larger slices have hosts of four chips.
    return Slice(f"{chip.name}-{number}", chip, shape, shape if shape == (2, 4, 1) else (2, 2, 1))


SLICES = {s.name: s for c in CHIPS.values() for s in (_named(c, n, shape) for n, shape in _SHAPES[c.name].items())}


def slice_of(config: RunConfig) -> Slice:
    """Return the slice that `mesh.slice` names; raises ConfigError as `find_slice`."""
    return find_slice(config.mesh.slice or "")


def find_slice(name: str) -> Slice:
    """Return the slice `v4-64`, or two of it for `2xv4-64`; raises ConfigError with the known names."""
    match = re.fullmatch(r"(?:(\d+)x)?(\w+-\d+)", name)
    known = SLICES.get(match[2].replace("v5litepod", "v5e")) if match else None
    if match is None or known is None or match[1] == "0":
        problem = f"mesh.slice={name!r} is not a known slice" if name else "mesh.slice is not given"
        raise ConfigError(f"{problem}; use one of {', '.join(SLICES)}, or 2x{next(iter(SLICES))} for two of them")
    return replace(known, name=name, count=int(match[1] or 1))
