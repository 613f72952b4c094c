"""Estimate a compiled step's seconds by a walk over its schedule, in the compiler's own cycles.

Compute is the sum of `estimated_cycles` over the clock, loop bodies times their trips. Collectives, and transfers to and
from the host's memory, take their bytes over the link's bandwidth; each kind of link serves one after another. Compute
between an asynchronous one's start and its done hides it. `hidden` seconds leave the waiting out, `paid` seconds add it.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

from easylm_mling.plan.hlo import Computation, Instruction, Module, flops, trip_count
from easylm_mling.plan.kernels import Kernel, kernel
from easylm_mling.plan.slices import Slice

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
HOST_MEMORY = 5  # the host's memory space in a layout
HOST_BYTES = 15e9  # over PCIe a second (jax-ml.github.io/scaling-book, "How to think about TPUs")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")
_PRODUCTS = ("convolution", "dot")
TIMES = ("matrix", "other", "attention", "waiting", "product_flops", "kernel_flops")


@dataclass(frozen=True)
class Collective:
    """One collective, or one transfer to or from the host."""

    kind: str
    bytes: float  # that a chip's link carries
    group: int  # chips that take part
    asynchronous: bool
    link: str = "chips"  # between chips, between "slices", or to the "host"

    def seconds(self, target: Slice) -> float:
        """Return the seconds on an idle link."""
        chip = target.chip
        return self.bytes / {"chips": chip.link_bytes, "slices": chip.dcn_bytes, "host": HOST_BYTES}[self.link]


@dataclass
class Times:
    """Seconds and counts of a computation that runs once."""

    matrix: float = 0.0
    other: float = 0.0
    attention: float = 0.0
    waiting: float = 0.0  # for collectives
    product_flops: float = 0.0
    kernel_flops: float = 0.0
    kernels: dict[Kernel, float] = field(default_factory=lambda: defaultdict(float))  # runs
    collectives: dict[Collective, float] = field(default_factory=lambda: defaultdict(float))  # runs
    waits: dict[Collective, float] = field(default_factory=lambda: defaultdict(float))  # seconds waited

    @property
    def hidden(self) -> float:
        """Seconds with all waiting hidden."""
        return self.matrix + self.other + self.attention

    @property
    def paid(self) -> float:
        """Seconds with all waiting."""
        return self.hidden + self.waiting

    def add(self, part: "Times", times: float = 1):
        """Add a computation that runs `times` times."""
        for name in TIMES:
            setattr(self, name, getattr(self, name) + times * getattr(part, name))
        for name in ("kernels", "collectives", "waits"):
            total = getattr(self, name)
            for key, count in getattr(part, name).items():
                total[key] += times * count


def walk(module: Module, target: Slice) -> Times:
    """Return the seconds of one step of the compiled program on one chip of `target`."""
    return _Walk(module, target).computation(module.entry)


@dataclass
class _Links:
    """The clock of a computation, and the times at which its links are free again, in seconds."""

    target: Slice
    clock: float = 0.0
    free_at: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    running: dict[str, tuple[float, Collective]] = field(default_factory=dict)  # name -> its end

    def start(self, name: str, collective: Collective, times: Times):
        times.collectives[collective] += 1
        link = collective.link
        self.free_at[link] = max(self.free_at[link], self.clock) + collective.seconds(self.target)
        self.running[name] = self.free_at[link], collective

    def finish(self, name: str, times: Times):
        """Wait for the collective that was started under this name, if one was."""
        if name in self.running:
            end, collective = self.running.pop(name)
            waited = max(0.0, end - self.clock)
            self.clock += waited
            times.waiting += waited
            times.waits[collective] += waited


class _Walk:
    """One walk over a module. Each computation is timed once, however often it is called."""

    def __init__(self, module: Module, target: Slice):
        self.module, self.target, self.done = module, target, {}

    def computation(self, name: str) -> Times:
        if name not in self.done:
            self.done[name] = self._walk(self.module.computations[name])
        return self.done[name]

    def _walk(self, c: Computation) -> Times:
        times, link = Times(), _Links(self.target)
        for i in c.instructions:
            before = times.hidden
            self._instruction(c, i, times, link)
            link.clock += times.hidden - before
        return times

    def _instruction(self, c: Computation, i: Instruction, times: Times, link: _Links):
        if i.opcode in _FREE:
            return
        if i.opcode == "while":
            trips = trip_count(self.module, i)
            self._below(self.computation(i.called("body")[0]), times, link, trips)
        elif i.opcode == "conditional":
            branches = i.called("branch_computations", "true_computation", "false_computation")
            self._below(max((self.computation(b) for b in branches), key=lambda t: t.paid), times, link)
        elif i.opcode == "call":
            self._below(self.computation(i.called("to_apply")[0]), times, link)
        elif i.opcode.endswith("-done"):
            link.finish(self._first(c, i), times)
        elif i.opcode.endswith("-update"):
            pass
        elif i.opcode == "send":
            if sent := self._sent(c, i):
                link.start(_rendezvous(i), sent, times)
        elif moved := _transfer(i):
            link.start(i.name, moved, times)
        elif chained := self._chained(i):
            chain, collective, role = chained
            if role == "start":
                link.start(chain, collective, times)
            elif role == "done":
                link.finish(chain, times)
            else:
                self._compute(c, i, times)
        elif collective := self._collective(c, i):
            link.start(i.name, collective, times)
            if not collective.asynchronous:
                link.finish(i.name, times)
        elif pallas := kernel(c, i, self.target.chip):
            times.kernels[pallas] += 1
            times.attention += pallas.seconds
            times.kernel_flops += pallas.flops
        else:
            self._compute(c, i, times)

    def _below(self, part: Times, times: Times, link: _Links, trips: int = 1):
        """Add a called computation. The caller adds its compute to the clock, and this its waiting."""
        times.add(part, trips)
        link.clock += trips * part.waiting

    def _chained(self, i: Instruction) -> tuple[str, Collective, str] | None:
        """Return the chain, collective and role ("start", "step", "done") of a fusion that carries a part of a collective.

        v5e spreads a collective over several fusions; a step stands inside of other work.
        """
        if i.opcode != "fusion":
            return None
        part = self.module.computations[i.called("calls")[0]]
        for inner in part.instructions:
            chain = re.search(r'chain_id="(\d+)"', inner.attributes)
            if chain and inner.opcode in COLLECTIVES:
                targets = [
                    re.search(r'custom_call_target="AsyncCollective(Start|Done)"', x.attributes)
                    for x in part.instructions
                ]
                role = next((t[1].lower() for t in targets if t), "step")
                size = sum(a.bytes for o in part.operands(inner) for a in o.arrays)
                return f"chain {chain[1]}", self._sized(inner.opcode, size, inner, True), role
        return None

    def _first(self, c: Computation, i: Instruction) -> str:
        """Return the name under which the work of a done was started."""
        while i.operands and i.opcode.endswith(("-done", "-update")):
            i = c.by_name[i.operands[0]]
        return _rendezvous(i) if i.opcode == "recv" else i.name

    def _sent(self, c: Computation, i: Instruction) -> Collective | None:
        """Return the collective between slices whose data this `send` hands to the runtime."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
        if kind is None:
            return None
        size, n = c.by_name[i.operands[0]].arrays[0].bytes, self.target.count
        name = kind[1].lower().replace("_", "-")
        return Collective(name, _carried(name, size, n), n, True, "slices")

    def _collective(self, c: Computation, i: Instruction) -> Collective | None:
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return self._sized(kind, sum(a.bytes for o in c.operands(i) for a in o.arrays), i, i.opcode != kind)
        if i.opcode not in ("fusion", "async-start", "custom-call"):
            return None
        for part in self.module.all_below("".join(i.called("calls")[:1])):
            for inner in part.instructions:
                kind = inner.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    # An all-reduce whose result each chip slices is a reduce-scatter.
                    kind = "reduce-scatter" if "all-reduce-scatter" in part.name else kind
                    size = sum(a.bytes for o in part.operands(inner) for a in o.arrays)
                    return self._sized(kind, size, inner, i.opcode == "async-start")
        return None

    def _sized(self, kind: str, size: float, i: Instruction, asynchronous: bool) -> Collective:
        """Return the collective into which each chip puts `size` bytes."""
        group, target = i.group(), self.target
        n = len(group) or target.devices
        per_slice = target.devices // target.count
        between = len({d // per_slice for d in group}) > 1 or (not group and target.count > 1)
        return Collective(kind, _carried(kind, size, n), n, asynchronous, "slices" if between else "chips")

    def _compute(self, c: Computation, i: Instruction, times: Times):
        work = self._products(c, i)
        times.product_flops += work
        if i.cycles is None:
            return
        seconds = i.cycles / self.target.chip.clock_hz
        if work:
            times.matrix += seconds
        else:
            times.other += seconds

    def _products(self, c: Computation, i: Instruction) -> float:
        """Count the FLOPs of the products in this instruction, or in the fusion that it calls."""
        if i.opcode in _PRODUCTS:
            return flops(c, i)
        inside = self.module.all_below(i.called("calls")[0]) if i.opcode == "fusion" else []
        return sum(flops(part, p) for part in inside for p in part.instructions if p.opcode in _PRODUCTS)


def _carried(kind: str, size: float, n: int) -> float:
    """Return the bytes over a chip's link where each of `n` chips puts `size` bytes in."""
    if kind == "all-gather":
        return size * (n - 1)
    if kind == "collective-permute":
        return size
    return size * (2 if kind == "all-reduce" else 1) * (n - 1) / n


def _transfer(i: Instruction) -> Collective | None:
    """Return an asynchronous transfer to or from the host's memory; None for any other instruction."""
    if not i.opcode.endswith("-start") or all(a.memory != HOST_MEMORY for a in i.arrays):
        return None
    moved = max(a.bytes for a in i.arrays if a.memory != HOST_MEMORY)
    return Collective("transfer", moved, 1, True, "host")


def _rendezvous(i: Instruction) -> str:
    """Return the name by which the slices' send and receive belong together."""
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', i.attributes)
    return match[1] if match else i.name
