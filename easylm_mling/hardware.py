"""The known TPU chips: the compiler's name of each, its speed and its memory.

Sources: cloud.google.com/tpu/docs for peaks. The clock is that of the compiler's cycle estimates, and the memory what the
compiler says is usable. A link's bandwidth is that of one ring on one axis of the torus, as large transfers reach it.
"""

from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip, which is one JAX device."""

    name: str
    device_kind: str  # JAX's name
    topology: str  # libtpu's name of its torus
    core_config: str  # libtpu's name of how its cores are driven; `megacore`: two cores as one device
    peak_flops: float  # a second, in bf16
    clock_hz: float
    hbm_bytes: int  # usable by a program
    link_bytes: float  # a second, to other chips of its slice
    dcn_bytes: float  # a second, to other slices over the data-centre network


CHIPS = {
    c.name: c
    for c in (
        Chip("v4", "TPU v4", "v4", "megacore", 275e12, 1.05e9, int(30.75 * GiB), 90e9, 3.1e9),
        Chip("v5p", "TPU v5", "v5", "megacore", 459e12, 1.75e9, int(95.74 * GiB), 180e9, 6.2e9),
        Chip("v5e", "TPU v5 lite", "v5e", "default", 197e12, 1.5e9, int(15.75 * GiB), 90e9, 3.1e9),
        Chip("v6e", "TPU v6 lite", "v6e", "default", 918e12, 1.75e9, int(31.25 * GiB), 180e9, 12.5e9),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, if it is known."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device_kind), None)
