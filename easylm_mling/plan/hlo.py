"""Parse scheduled HLO text: computations, instructions, and the FLOPs and bytes of one instruction.

Source: the text format of openxla/xla, `docs/hlo_text` and `hlo/parser/hlo_parser.cc`; only what plans need.
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

_BITS = {
    "pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16,
    "f32": 32, "f64": 64, "c64": 64, "c128": 128, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    memory: int  # of its layout: 0 HBM, 1 vector memory, 5 the host's

    @property
    def bytes(self) -> float:
        """Its size; an unknown dtype counts as nothing."""
        return math.prod(self.dims) * _BITS.get(self.dtype, 0) / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One instruction, still as text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # everything behind the operands
    text: str  # the operands as written, or a constant's value

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result; a tuple's one after another."""
        return arrays(self.shape)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, if it made one."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """Its origin in the program: `jit(step)/.../dot_general`."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1].replace("\\'", "'") if match else ""

    def called(self, *keys: str) -> list[str]:
        """Return the names of the computations under these attributes, such as `calls` or `body`."""
        names = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            names += re.findall(r"[\w.\-]+", match[1]) if match else []
        return names

    def group(self) -> tuple[int, ...]:
        """Return the device numbers in a collective's first replica group; empty for all devices."""
        listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", self.attributes)
        if listed:
            return tuple(int(x) for x in listed[1].split(",") if x)
        iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", self.attributes)
        if iota:
            dims = [int(x) for x in iota[3].split(",")]
            order = [int(x) for x in iota[4].split(",")] if iota[4] else list(range(len(dims)))
            return _devices(dims, order, int(iota[2]))
        mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", self.attributes)
        if mesh is None:
            return ()
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        names, dims = list(sizes), [int(n) for n in sizes.values()]
        within = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[2])]
        order = [d for d in range(len(dims)) if d not in within] + within
        return _devices(dims, order, math.prod(dims[d] for d in within))


def _devices(dims: list[int], order: list[int], size: int) -> tuple[int, ...]:
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, size)
    return tuple(int(x) for x in ids[0])


@dataclass
class Computation:
    """A list of instructions in the order of the schedule."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by name."""
        return {i.name: i for i in self.instructions}

    def operands(self, i: Instruction) -> list[Instruction]:
        """Return the instructions that make the operands of `i`."""
        return [self.by_name[o] for o in i.operands if o in self.by_name]


@dataclass
class Module:
    """A compiled program."""

    entry: str
    computations: dict[str, Computation]

    def all_below(self, name: str) -> list[Computation]:
        """Return the computation and every one that it calls, fusions too."""
        seen, pending = {}, [name]
        while pending:
            name = pending.pop()
            if name in seen or name not in self.computations:
                continue
            seen[name] = self.computations[name]
            for i in seen[name].instructions:
                pending += i.called(
                    "calls", "to_apply", "body", "condition", "branch_computations", "called_computations"
                )
        return list(seen.values())


def parse(text: str) -> Module:
    """Parse the text of a scheduled module."""
    computations, entry, current = {}, "", None
    # A kernel's metadata may hold line breaks; an instruction never begins at a line's first column.
    for line in re.sub(r"\{\n(?=\")|(?<=\")\n(?=\})", " ", text).splitlines():
        head = _COMPUTATION.match(line) if line.endswith("{") and " = " not in line.split("(")[0] else None
        if head:
            current = computations.setdefault(head[2], Computation(head[2]))
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.instructions.append(_instruction(match[2], match[3]))
    assert entry, "no ENTRY computation in the HLO text"
    return Module(entry, computations)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name, shape, rest[:opening], tuple(re.findall(r"%([\w.\-]+)", inside)), rest[closing + 1 :], inside
    )


def _closing(text: str, opening: int) -> int:
    """Return the index at which the parenthesis at `opening` closes."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise AssertionError(f"unbalanced parentheses: {text[:200]}")


def arrays(shape: str) -> tuple[Array, ...]:
    """Parse a shape: the one array, or those of a tuple."""
    parsed = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(re.sub(r"\D", "", d)) for d in dims.split(",") if d.strip())
        memory = re.search(r"S\((\d+)\)", layout or "")
        parsed.append(Array(dtype, sizes, int(memory[1]) if memory else 0))
    return tuple(parsed)


def trip_count(module: Module, loop: Instruction) -> int:
    """Return the trips of a while loop: the compiler's note, or else the largest integer in its condition."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    values = [
        int(i.text)
        for c in module.all_below(loop.called("condition")[0])
        for i in c.instructions
        if i.opcode == "constant" and re.fullmatch(r"\d+", i.text)
    ]
    return max(values, default=1)


def flops(computation: Computation, i: Instruction) -> float:
    """Count the FLOPs of a `dot` or `convolution`: two for each product, without those of padding."""
    out = math.prod(i.arrays[0].dims)
    left, right = (o.arrays[0].dims for o in computation.operands(i)[:2])
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        return 2.0 * out * math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 2.0 * out
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i.attributes
    lhs, rhs, result = labels[1], labels[2], labels[3]
    window = _window(i.attributes)
    spatial = [c for c in result if c.isdigit()]
    taps = 1.0
    for c in spatial:
        settings = {key: values[int(c)] for key, values in window.items()}
        size, stride, low = settings.get("size", "1"), settings.get("stride", "1"), settings.get("pad", "0_0")
        taps *= _taps(
            left[lhs.index(c)], right[rhs.index(c)], i.arrays[0].dims[result.index(c)], int(stride), int(low.split("_")[0]),
            int(settings.get("lhs_dilate", "1")), int(settings.get("rhs_dilate", "1")),
        )  # fmt: skip
        assert int(size) == right[rhs.index(c)], i.attributes
    positions = math.prod(i.arrays[0].dims[result.index(c)] for c in spatial)
    return 2.0 * out / positions * taps * right[rhs.index("i")]


def _window(attributes: str) -> dict[str, list[str]]:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    return {k: v.split("x") for k, v in (part.split("=") for part in match[1].split())} if match else {}


@lru_cache(maxsize=4096)
def _taps(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """Count the pairs (output position, kernel position) that fall on an input value, along one spatial axis."""
    end, total = (size - 1) * dilate + 1, 0
    positions = np.arange(out, dtype=np.int64) * stride - low
    for k in range(kernel):
        at = positions + k * kernel_dilate
        total += int(np.count_nonzero((at >= 0) & (at < end) & (at % dilate == 0)))
    return total
