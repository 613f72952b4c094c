"""Estimate a compiled step's seconds by a walk over its schedule, in the compiler's own cycles.

Compute is the sum of `estimated_cycles` over the clock, loop bodies times their trips. Collectives, and transfers to and
from the host's memory, are bytes over link bandwidth, on one link of each kind that serves them one after another; the
compute between an asynchronous one's start and its done hides it. `hidden` seconds take all of them as free, `paid` seconds
add what is waited for.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

from easylm_mling.plan.hlo import Computation, Instruction, Module, flops, trip_count
from easylm_mling.plan.kernels import Kernel, kernel
from easylm_mling.plan.slices import Slice

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# A layout's memory space that is the host's, and what PCIe carries of it a second
# (jax-ml.github.io/scaling-book, "How to think about TPUs").
HOST_MEMORY = 5
HOST_BYTES = 15e9
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")
_PRODUCTS = ("convolution", "dot")


@dataclass(frozen=True)
class Collective:
    """One collective, or transfer to or from the host; `bytes` are those that a chip's link must carry."""

    kind: str
    bytes: float
    group: int
    asynchronous: bool
    link: str = "chips"  # between chips, between "slices", or to the "host"

    def seconds(self, where: Slice) -> float:
        return (
            self.bytes / {"chips": where.chip.link_bytes, "slices": where.chip.dcn_bytes, "host": HOST_BYTES}[self.link]
        )


@dataclass
class Times:
    """Seconds and counts of a computation that is run once."""

    matrix: float = 0.0
    other: float = 0.0
    attention: float = 0.0
    waiting: float = 0.0  # for collectives
    product_flops: float = 0.0
    kernel_flops: float = 0.0
    # How often a step.
    kernels: dict[Kernel, float] = field(default_factory=lambda: defaultdict(float))
    collectives: dict[Collective, float] = field(default_factory=lambda: defaultdict(float))
    waits: dict[Collective, float] = field(default_factory=lambda: defaultdict(float))  # Collective -> seconds waited

    @property
    def hidden(self) -> float:
        return self.matrix + self.other + self.attention

    @property
    def paid(self) -> float:
        return self.hidden + self.waiting

    def add(self, part: "Times", times: float = 1):
        for name in ("matrix", "other", "attention", "waiting", "product_flops", "kernel_flops"):
            setattr(self, name, getattr(self, name) + times * getattr(part, name))
        for name in ("kernels", "collectives", "waits"):
            mine = getattr(self, name)
            for key, count in getattr(part, name).items():
                mine[key] += times * count


@dataclass
class _Links:
    """The clock of a computation, and until when its links are busy."""

    now: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    under_way: dict[str, tuple[float, Collective]] = field(default_factory=dict)

    def start(self, name: str, collective: Collective, where: Slice, times: Times):
        times.collectives[collective] += 1
        link = collective.link
        self.busy[link] = max(self.busy[link], self.now) + collective.seconds(where)
        self.under_way[name] = self.busy[link], collective

    def finish(self, name: str, times: Times):
        """Wait for what was started under this name; nothing where nothing was."""
        if name in self.under_way:
            end, collective = self.under_way.pop(name)
            waited = max(0.0, end - self.now)
            self.now += waited
            times.waiting += waited
            times.waits[collective] += waited


class Walk:
    def __init__(self, module: Module, where: Slice, local_share: float):
        self.module, self.where, self.local_share, self.done = module, where, local_share, {}

    def step(self) -> Times:
        return self.computation(self.module.entry)

    def computation(self, name: str) -> Times:
        if name not in self.done:
            self.done[name] = self._walk(self.module.computations[name])
        return self.done[name]

    def _walk(self, c: Computation) -> Times:
        times, link = Times(), _Links()
        for i in c.instructions:
            before = times.hidden
            self._instruction(c, i, times, link)
            link.now += times.hidden - before
        return times

    def _instruction(self, c: Computation, i: Instruction, times: Times, link: _Links):
        if i.opcode in _FREE:
            return
        if i.opcode == "while":
            trips = trip_count(self.module, i)
            self._below(self.computation(i.called("body")[0]), times, link, trips)
        elif i.opcode == "conditional":
            branches = i.called("branch_computations", "true_computation", "false_computation")
            self._below(self._either([self.computation(b) for b in branches]), times, link)
        elif i.opcode == "call":
            self._below(self.computation(i.called("to_apply")[0]), times, link)
        elif i.opcode.endswith("-done"):
            link.finish(self._first(c, i), times)
        elif i.opcode.endswith("-update"):
            pass
        elif i.opcode == "send":
            if sent := self._sent(c, i):
                link.start(_rendezvous(i), sent, self.where, times)
        elif moved := _transfer(i):
            link.start(i.name, moved, self.where, times)
        elif chained := self._chained(i):
            chain, collective, role = chained
            if role == "start":
                link.start(chain, collective, self.where, times)
            elif role == "done":
                link.finish(chain, times)
            else:
                self._compute(c, i, times)
        elif collective := self._collective(c, i):
            link.start(i.name, collective, self.where, times)
            if not collective.asynchronous:
                link.finish(i.name, times)
        elif found := kernel(c, i, self.where.chip):
            times.kernels[found] += 1
            times.attention += found.seconds
            times.kernel_flops += found.flops
        else:
            self._compute(c, i, times)

    def _below(self, part: Times, times: Times, link: _Links, trips: int = 1):
        """What a called computation takes; its waiting moves this one's clock too."""
        times.add(part, trips)
        link.now += trips * part.waiting

    def _either(self, branches: list[Times]) -> Times:
        """One of two attention kernels, by how many layers are local; of anything else, the slowest branch."""
        slowest, fastest = (pick(branches, key=lambda t: t.paid) for pick in (max, min))
        if len(branches) != 2 or not (slowest.kernels and fastest.kernels):
            return slowest
        mean = Times()
        mean.add(slowest, 1 - self.local_share)
        mean.add(fastest, self.local_share)
        return mean

    def _chained(self, i: Instruction) -> tuple[str, Collective, str] | None:
        """A collective that v5e carries through several fusions: its chain, and whether this is its start, its done or a
        step of it inside of other work."""
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
        """The name under which a done's work was started: its start, or what slices meet by."""
        while i.operands and i.opcode.endswith(("-done", "-update")):
            i = c.by_name[i.operands[0]]
        return _rendezvous(i) if i.opcode == "recv" else i.name

    def _sent(self, c: Computation, i: Instruction) -> Collective | None:
        """A collective between slices: what one sends to the runtime, and later receives."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
        if kind is None:
            return None
        size, n = c.by_name[i.operands[0]].arrays[0].bytes, self.where.count
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
                    # An all-reduce of which each chip keeps its own slice is a reduce-scatter.
                    kind = "reduce-scatter" if "all-reduce-scatter" in part.name else kind
                    size = sum(a.bytes for o in part.operands(inner) for a in o.arrays)
                    return self._sized(kind, size, inner, i.opcode == "async-start")
        return None

    def _sized(self, kind: str, size: float, i: Instruction, asynchronous: bool) -> Collective:
        """`size`: bytes that a chip puts in."""
        group = i.group()
        n = len(group) or self.where.chips
        per_slice = self.where.chips // self.where.count
        between = len({d // per_slice for d in group}) > 1 or (not group and self.where.count > 1)
        return Collective(kind, _carried(kind, size, n), n, asynchronous, "slices" if between else "chips")

    def _compute(self, c: Computation, i: Instruction, times: Times):
        work = self._products(c, i)
        times.product_flops += work
        if i.cycles is None:
            return
        seconds = i.cycles / self.where.chip.clock_hz
        if work:
            times.matrix += seconds
        else:
            times.other += seconds

    def _products(self, c: Computation, i: Instruction) -> float:
        """FLOPs of all products in this instruction: its own, or those of the fusion that it calls."""
        if i.opcode in _PRODUCTS:
            return flops(c, i)
        inside = self.module.all_below(i.called("calls")[0]) if i.opcode == "fusion" else []
        return sum(flops(part, p) for part in inside for p in part.instructions if p.opcode in _PRODUCTS)


def _carried(kind: str, size: float, n: int) -> float:
    """Bytes over a chip's link, where each of `n` puts `size` bytes in."""
    if kind == "all-gather":
        return size * (n - 1)
    if kind == "collective-permute":
        return size
    return size * (2 if kind == "all-reduce" else 1) * (n - 1) / n


def _transfer(i: Instruction) -> Collective | None:
    """What is put into the host's memory or taken from it, asynchronously; None for anything else."""
    if not i.opcode.endswith("-start") or all(a.memory != HOST_MEMORY for a in i.arrays):
        return None
    moved = max(a.bytes for a in i.arrays if a.memory != HOST_MEMORY)
    return Collective("transfer", moved, 1, True, "host")


def _rendezvous(i: Instruction) -> str:
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', i.attributes)
    return found[1] if found else i.name


def walk(module: Module, where: Slice, local_share: float = 0.0) -> Times:
    """The seconds of one step of the compiled program on one chip of `where`. `local_share`: of the layers, those with a
    sliding window."""
    return Walk(module, where, local_share).step()
