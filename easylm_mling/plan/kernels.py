"""Estimate the seconds of Pallas kernels, which the compiler's HLO leaves out.

Splash attention: instruction bundles of the compiler's schedule over the clock (no waiting for memory), scaled by heads,
positions, head_dim and blocks, but never less than its products take at the chip's peak: a bundle may last several cycles
of the matrix unit. Any other kernel: its own cost estimate at a share of the peak; a kernel without one counts
as nothing, and the plan says so.
"""

import math
import re
from dataclasses import dataclass

from easylm_mling.hardware import CHIPS, Chip
from easylm_mling.plan.hlo import Array, Computation, Instruction

# Milliseconds of (forward, dq, dkv) for [16 heads, 8192 positions, head_dim 256] with segment ids, causal, by the product
# of query and key block. On v4 and v5p both cores share the forward pass. They share the backward pass only where the
# kernel is mapped over heads, which adds an axis to its queries: the loop over its grid is then half as long.
_MEASURED = {
    "v4": {512 * 512: (4.37, 9.15, 11.44), 1024 * 1024: (3.69, 7.76, 10.13)},
    "v5p": {512 * 512: (1.95, 4.48, 5.79), 1024 * 1024: (1.58, 3.95, 5.09)},
    "v5e": {512 * 512: (4.01, 4.91, 6.47), 1024 * 1024: (3.49, 4.54, 5.88)},
    "v6e": {512 * 512: (2.07, 2.14, 2.54), 2048 * 512: (1.64, 1.61, 2.03)},
}
# Not measured on TPU7x: a v6e's cycles, whose matrix units are as wide, on one of the two devices of a chip.
LIKE = {"tpu7x": "v6e"}
_KINDS = {"fwd": 0, "dq": 1, "dkv": 2}
# Products of [block, block, head_dim] in each kernel; a dkv kernel that also makes dq has one more.
_PRODUCTS = (2, 3, 4)
OTHER_KERNELS_SHARE = 0.5


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel on one chip."""

    name: str
    seconds: float
    flops: float
    known: bool  # False where nothing says how long it takes, and `seconds` is 0


def kernel(c: Computation, i: Instruction, chip: Chip) -> Kernel | None:
    """Return the Pallas kernel that instruction `i` of `c` runs; None for any other instruction."""
    if i.opcode != "custom-call" or '"tpu_custom_call"' not in i.attributes:
        return None
    splash = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{i.name} {i.op_name}")
    if splash:
        return _splash(c, i, chip, _KINDS[splash[1]])
    cost = re.search(r'"flops":"?(\d+)', i.attributes)
    flops = float(cost[1]) if cost else 0.0
    return Kernel(_name(i), flops / (OTHER_KERNELS_SHARE * chip.peak_flops), flops, bool(cost))


def _splash(c: Computation, i: Instruction, chip: Chip, kind: int) -> Kernel:
    blocks = {key: int(n) for key, n in re.findall(r'\\"(block_\w+?)(?:_dq|_dkv)?\\": (\d+)', i.attributes)}
    block_q, block_kv = blocks.get("block_q", 512), blocks.get("block_kv", 512)
    arrays = [a for o in c.operands(i) for a in o.arrays[:1]]
    q, k = [a for a in arrays if a.dtype in ("bf16", "f32") and len(a.dims) >= 2][:2]
    *heads, T, head_dim = q.dims
    S = k.dims[-2]  # more than T where a device has a part of the queries (model/sequence_shares.py)
    seen = _share_of_blocks(arrays, kind, T // block_q, S // block_kv)
    fused = kind == 2 and any(len(a.dims) > len(q.dims) for a in i.arrays)
    one_core = kind > 0 and chip.core_config == "megacore"
    halved = one_core and len(heads) > 1 and math.prod(heads) % 2 == 0
    products = _PRODUCTS[kind] + fused
    work = math.prod(heads) * T * S * seen * head_dim
    reference = 16 * 8192**2 * _causal(8192 // block_kv) * 256
    ms = _milliseconds(chip, block_q * block_kv, kind) * products / _PRODUCTS[kind] / (2 if halved else 1)
    flops = 2.0 * products * work
    floor = flops / chip.peak_flops * (2 if one_core and not halved else 1)
    return Kernel(f"{_name(i)} {block_q}x{block_kv}", max(ms / 1000 * work / reference, floor), flops, True)


def _share_of_blocks(arrays: list[Array], kind: int, queries: int, keys: int) -> float:
    """Return the share of the blocks of `queries` by `keys` that the kernel visits.

    A block of queries visits those at and before its own, at most as many as a windowed grid is wide. The kernel's int8
    table of blocks has that width along its last axis, and in dkv, where each block of keys visits queries, along the one
    before.
    """
    axis, n = (-2, queries) if kind == _KINDS["dkv"] else (-1, keys)
    width = next((a.dims[axis] for a in arrays if a.dtype == "s8" and len(a.dims) == 3), n)
    if queries != keys:
        return min(_causal(keys), width / max(1, n))
    # The first blocks have fewer before them than the window is wide.
    return (width * (width + 1) / 2 + (n - width) * width) / max(1, n) ** 2


def _causal(n: int) -> float:
    return (n + 1) / (2 * max(1, n))


def _milliseconds(chip: Chip, area: int, kind: int) -> float:
    """Return the milliseconds of the reference's kernel with blocks of `area`, by the chip's own bundles or a like chip's."""
    measured = CHIPS[LIKE.get(chip.name, chip.name)]
    return _between(_MEASURED[measured.name], area, kind) * measured.clock_hz / chip.clock_hz


def _between(measured: dict[int, tuple], area: int, kind: int) -> float:
    """Interpolate the measured milliseconds between two sizes of blocks, by the logarithm of their area."""
    (small, at_small), (large, at_large) = sorted(measured.items())
    share = math.log(max(small, min(large, area)) / small) / math.log(large / small)
    return at_small[kind] + share * (at_large[kind] - at_small[kind])


def _name(i: Instruction) -> str:
    return re.sub(r"[.\d]+$", "", i.name)
