"""Which buffers fill a chip's memory when it is fullest, from the compiler's own reports."""

import re
from typing import NamedTuple

from easylm_mling.plan.hlo import Module

_SCALE = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# One of "Largest program allocations in hbm" in the message of a program that does not fit.
_LISTED = re.compile(
    r"Size: ([\d.]+[KMGT]?)\n(?:\s+Operator: op_name=\"([^\n]*?)\"[^\n]*\n)?\s+Shape: (\S+)[\s\S]*?XLA label: ([^\n ]*)"
)


class Buffer(NamedTuple):
    name: str  # of the instruction that makes it
    bytes: int
    shape: str
    what: str  # where in the program: the compiler's op_name, or the argument's path


def largest_live(report: str, module: Module, count: int = 5) -> list[Buffer]:
    """The `count` largest buffers that are alive at the peak, from an XLA dump's live-range report."""
    found, at_peak = [], False
    by_name = {i.name: i for c in module.computations.values() for i in c.instructions}
    for line in report.splitlines():
        if "(peak):" in line:
            at_peak = True
        elif at_peak and (one := re.match(r"\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", line)):
            maker = by_name.get(one[1])
            arrays = maker.arrays if maker else ()
            place = int(one[2]) if one[2].isdigit() else 0
            shape = str(arrays[place]) if place < len(arrays) else ""
            found.append(Buffer(one[1], int(one[3]), shape, maker.op_name if maker else ""))
        elif at_peak:
            break
    return sorted(found, key=lambda b: -b.bytes)[:count]


def listed_in(message: str) -> list[Buffer]:
    """The buffers that the compiler names where a program does not fit."""
    return [
        Buffer(label, to_bytes(size), re.sub(r"\{.*", "", shape), where)
        for size, where, shape, label in _LISTED.findall(message)
    ]


def to_bytes(text: str) -> int:
    """`1.5G`, as the compiler writes it."""
    scale = _SCALE.get(text[-1], 0)
    return int(float(text[:-1]) * scale) if scale else int(float(text))
