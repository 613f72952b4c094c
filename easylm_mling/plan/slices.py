"""The TPU slices that a run can be planned for: names, shapes, and the chip of each.

Sources: cloud.google.com/tpu/docs (peaks, memory, slice shapes; a v4 or v5p name counts TensorCores, two a chip). The
clock is the one of the compiler's cycle estimates. Usable memory is what the compiler itself says when a program is too
large. Link bandwidth is that of one ring on one axis of the torus, as large transfers reach it.
"""

import math
import re
from dataclasses import dataclass

from easylm_mling.errors import ConfigError
from easylm_mling.hardware import CHIPS, Chip


@dataclass(frozen=True)
class Slice:
    """`count` slices of one shape, joined by the data-centre network where there are several."""

    name: str
    chip: Chip
    shape: tuple[int, int, int]
    host: tuple[int, int, int]  # chips of one host along each axis
    count: int = 1

    @property
    def chips(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def hosts(self) -> int:
        return self.chips // math.prod(self.host)


# The number in a slice's name: its shape. v4 and v5p are cut from a three-dimensional torus, the others from a plane.
_CUBES = {
    8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8), 512: (4, 8, 8),
}  # fmt: skip
_PLANES = {4: (2, 2, 1), 8: (2, 4, 1), 16: (4, 4, 1), 32: (4, 8, 1), 64: (8, 8, 1), 128: (8, 16, 1), 256: (16, 16, 1)}
_SHAPES = {"v4": _CUBES, "v5p": _CUBES, "v5e": _PLANES, "v6e": _PLANES}


def _named(chip: Chip, number: int, shape: tuple[int, int, int]) -> Slice:
    # Eight chips of a plane hang on one host, and every larger slice on hosts of four.
    return Slice(f"{chip.name}-{number}", chip, shape, shape if shape == (2, 4, 1) else (2, 2, 1))


SLICES = {s.name: s for c in CHIPS.values() for s in (_named(c, n, shape) for n, shape in _SHAPES[c.name].items())}


def find_slice(name: str) -> Slice:
    """`v4-64`, or `2xv4-64` for two of them; raises ConfigError with the known names."""
    match = re.fullmatch(r"(?:(\d+)x)?(\w+-\d+)", name)
    known = SLICES.get(match[2].replace("v5litepod", "v5e")) if match else None
    if match is None or known is None or match[1] == "0":
        wrong = f"mesh.slice={name!r} is not a known slice" if name else "mesh.slice is not given"
        raise ConfigError(f"{wrong}; use one of {', '.join(SLICES)}, or 2x{next(iter(SLICES))} for two of them")
    count = int(match[1] or 1)
    return Slice(name, known.chip, known.shape, known.host, count)
