"""List the buffers that fill a chip's memory at its peak, from the live-range report of an XLA dump."""

import re
from typing import NamedTuple

from easylm_mling.plan.hlo import Instruction, Module


class Buffer(NamedTuple):
    """One buffer that is alive at the peak."""

    name: str  # of the instruction that makes it
    bytes: int
    shape: str
    what: str  # its origin in the program: the compiler's op_name, or the argument's path


def largest_live(report: str, module: Module, count: int = 5) -> list[Buffer]:
    """Return the `count` largest buffers that are alive at the peak."""
    buffers, at_peak = [], False
    makers = {i.name: i for c in module.computations.values() for i in c.instructions}
    users = {o: i for c in module.computations.values() for i in c.instructions for o in i.operands}
    for line in report.splitlines():
        if "(peak):" in line:
            at_peak = True
        elif at_peak and (match := re.match(r"\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", line)):
            maker = makers.get(match[1])
            arrays = maker.arrays if maker else ()
            index = int(match[2]) if match[2].isdigit() else 0
            shape = str(arrays[index]) if index < len(arrays) else ""
            buffers.append(Buffer(match[1], int(match[3]), shape, _origin(maker, users)))
        elif at_peak:
            break
    return sorted(buffers, key=lambda b: -b.bytes)[:count]


def _origin(maker: Instruction | None, users: dict[str, Instruction]) -> str:
    """Return the op_name of `maker`; for an instruction that the compiler added, that of its use."""
    for _ in range(4):
        if maker is None or maker.op_name:
            break
        maker = users.get(maker.name)
    return maker.op_name if maker else ""


def peak_bytes(report: str) -> int:
    """Return the bytes that are alive at the peak; 0 if the report does not say."""
    match = re.search(r"peak usage: ([\d ]+) bytes", report)
    return int(match[1].replace(" ", "")) if match else 0
