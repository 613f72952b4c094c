"""List the buffers that fill a chip's memory at its peak, from the live-range report of an XLA dump."""

import re
from typing import NamedTuple

from easylm_mling.plan.hlo import Instruction, Module


class Buffer(NamedTuple):
    name: str  # of the instruction that makes it
    bytes: int
    shape: str
    what: str  # where in the program: the compiler's op_name, or the argument's path


def largest_live(report: str, module: Module, count: int = 5) -> list[Buffer]:
    """The `count` largest buffers that are alive at the peak."""
    found, at_peak = [], False
    by_name = {i.name: i for c in module.computations.values() for i in c.instructions}
    users = {o: i for c in module.computations.values() for i in c.instructions for o in i.operands}
    for line in report.splitlines():
        if "(peak):" in line:
            at_peak = True
        elif at_peak and (one := re.match(r"\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", line)):
            maker = by_name.get(one[1])
            arrays = maker.arrays if maker else ()
            place = int(one[2]) if one[2].isdigit() else 0
            shape = str(arrays[place]) if place < len(arrays) else ""
            found.append(Buffer(one[1], int(one[3]), shape, _origin(maker, users) if maker else ""))
        elif at_peak:
            break
    return sorted(found, key=lambda b: -b.bytes)[:count]


def _origin(maker: Instruction, users: dict[str, Instruction]) -> str:
    """Where in the program it comes from; for what the compiler adds, where it goes."""
    now: Instruction | None = maker
    for _ in range(4):
        if now is None or now.op_name:
            break
        now = users.get(now.name)
    return now.op_name if now else ""


def peak_bytes(report: str) -> int:
    """Bytes alive at the peak, by the same report."""
    found = re.search(r"peak usage: ([\d ]+) bytes", report)
    return int(found[1].replace(" ", "")) if found else 0
