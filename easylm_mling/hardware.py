"""The known TPU chips: the compiler's name of each, its speed and its memory.

Sources: cloud.google.com/tpu/docs for peaks; a v4 has the same in int8 as in bf16, and what is not listed there is 0. The
clock is that of the compiler's cycle estimates, and the memory what the compiler says is usable. A link's bandwidth is that
of one ring on one axis of the torus, as large transfers reach it.

Source for TPU7x (Ironwood): docs.cloud.google.com/tpu/docs/tpu7x. A chip has 2307 TFLOP/s in bf16, 192 GiB of HBM and the
1200 GB/s between chips of a v5p, and is two JAX devices, one for each of its chiplets. Its clock is not published: it
follows from the peak and the products that a v6e's matrix units, which are as wide, make in one cycle.
"""

from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of chip. Its figures are those of one JAX device: the whole chip, or one of its `devices`."""

    name: str
    device_kind: str  # JAX's name
    topology: str  # libtpu's name of its torus
    core_config: str  # libtpu's name of how its cores are driven; `megacore`: two cores as one device
    peak_flops: float  # a second, in bf16
    clock_hz: float
    hbm_bytes: int  # usable by a program
    link_bytes: float  # a second, to other chips of its slice
    dcn_bytes: float  # a second, to other slices over the data-centre network
    int8_flops: float = 0.0  # a second; 0: int8 is no faster than bf16
    fp8_flops: float = 0.0
    devices: int = 1  # of one chip

    def peak_in(self, kind: str) -> float:
        """Return the peak of `int8` or `fp8` products a second; 0 where they are no faster than bf16."""
        return {"int8": self.int8_flops, "fp8": self.fp8_flops}[kind]

    @property
    def unit(self) -> str:
        """What the figures are of, in words."""
        return "chip" if self.devices == 1 else "device"


CHIPS = {
    c.name: c
    for c in (
        Chip("v4", "TPU v4", "v4", "megacore", 275e12, 1.05e9, int(30.75 * GiB), 90e9, 3.1e9),
        Chip("v5p", "TPU v5", "v5", "megacore", 459e12, 1.75e9, int(95.74 * GiB), 180e9, 6.2e9, 918e12),
        Chip("v5e", "TPU v5 lite", "v5e", "default", 197e12, 1.5e9, int(15.75 * GiB), 90e9, 3.1e9, 394e12),
        Chip("v6e", "TPU v6 lite", "v6e", "default", 918e12, 1.75e9, int(31.25 * GiB), 180e9, 12.5e9, 1836e12),
        # A ring through both devices of each chip crosses each link once.
        Chip("tpu7x", "TPU7x", "tpu7x", "default", 1153.5e12, 2.2e9, int(94.75 * GiB), 180e9, 6.2e9, 0.0, 2307e12, 2),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, if it is known."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device_kind), None)
