"""Print a plan, a ranking or a comparison for a person to read."""

import math
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from easylm_mling.config import MeshConfig, RunConfig
from easylm_mling.formatting import tokens_text
from easylm_mling.hardware import GiB
from easylm_mling.monitoring.console import say
from easylm_mling.plan.slices import slice_of

_KINDS = {
    "matrix": "matrix products",
    "other": "other compute",
    "attention": "attention",
    "waiting": "waiting for chips",
}
_SPEND = "train.remat=auto finds out how much of the free memory can be spent on speed"


def print_plan(config: RunConfig, plan: dict, console: Console):
    """Print one plan, a section after another."""
    say(console, heading(config, plan))
    for label, lines in sections(config, plan).items():
        for i, line in enumerate(lines):
            say(console, f" {label if i == 0 else '':<11} {line}")


def sections(config: RunConfig, plan: dict) -> dict[str, list[str]]:
    """Return the lines of each section of a plan."""
    step, memory, data = plan["step"], plan["memory"], plan["data_a_host"]
    peak, room = memory["peak"] / GiB, memory["available"] / GiB
    unit = slice_of(config).chip.unit
    host = f"; {memory['host'] / GiB:.1f} GiB a {unit} in the host's memory" if memory["host"] else ""
    cost = "" if plan["cost"] is None else f", {plan['cost']:,.0f} at the given price"
    parts = ", ".join(f"{what} {step['factor'] * step[k]:.2f}" for k, what in _KINDS.items())
    waited = sorted(plan["collectives"], key=lambda c: -c["waited"])[:4]
    return {
        "fits": [
            f"{peak:.1f} of {room:.1f} GiB a {unit} at the peak ({peak / room:.0%}), {room - peak:.1f} free{host}; largest:",
            *map(buffer_text, plan["buffers"]),
            *([_SPEND] if peak < 0.8 * room and config.train.remat != "none" else []),
        ],
        "step": [
            f"{step['seconds']:.2f} s: {parts}",
            *(f"{k['times']:6.0f} x {k['name']}: {_kernel_text(k)}" for k in plan["kernels"]),
            *(
                f"{c['times']:6.0f} x {_collective_text(c)}: {c['waited']:.2f} s waited"
                for c in waited
                if c["waited"] > 0.005
            ),
        ],
        "speed": [
            f"{tokens_text(plan['tokens_per_second'])} tokens/s; MFU {plan['mfu']:.1%} ({plan['mfu_hidden']:.1%} without waiting); "
            f"{plan['hardware_flops_per_model_flop']:.2f} FLOPs are done for each that the model needs",
            f"one sequence on one chip: {plan['seconds_a_sequence']['hidden']:.2f} s without waiting, "
            f"{plan['seconds_a_sequence']['paid']:.2f} with it",
        ],
        "budget": [
            f"{tokens_text(config.budget_tokens)} tokens in {plan['days']:.1f} days; {plan['chip_hours']:,.0f} chip-hours{cost}"
        ],
        "checkpoint": [f"{plan['checkpoint']['bytes'] / 1e9:.1f} GB, {plan['checkpoint']['seconds']:.0f} s"],
        "data": [
            f"{tokens_text(data['tokens_per_second'])} tokens/s a host, {data['bytes_per_second'] / 1e6:.2f} MB/s of text"
        ],
        "assumed": plan["assumptions"],
    }


def _kernel_text(k: dict) -> str:
    return f"{k['times'] * k['seconds']:.2f} s" if k["known"] else "unknown time, counted as none"


def _collective_text(c: dict) -> str:
    if c["link"] == "host":
        return f"transfer to or from the host, {c['bytes'] / 1e6:.0f} MB"
    where = " between slices" if c["link"] == "slices" else ""
    how = "asynchronous" if c["asynchronous"] else "synchronous"
    return f"{how} {c['kind']} among {c['group']}{where}, {c['bytes'] / 1e6:.0f} MB over a link"


def heading(config: RunConfig, plan: dict) -> str:
    """Return the first line of a plan: slice, hosts, settings, batch."""
    t, hosts = config.train, f"{plan['hosts']} host{'s' * (plan['hosts'] > 1)}"
    n = slice_of(config).chip.devices
    devices = f" of {n} devices" if n > 1 else ""
    return (
        f"{plan['slice']}: {plan['chips']} chips{devices} on {hosts}; {settings_text(config)}; "
        f"{t.batch_size} sequences of {config.data.sequence_length} a step"
    )


def settings_text(config: RunConfig) -> str:
    """Return the settings that a search varies."""
    lora = f"; LoRA rank {config.lora.rank}" if config.lora else ""
    products = f"; {config.train.products.text}" if config.train.products else ""
    return f"{mesh_text(config)}; remat {remat_text(config)}; accumulation {config.train.accumulation_steps}{lora}{products}"


def remat_text(config: RunConfig) -> str:
    """Return the remat policies and the values that go to the host."""
    t = config.train
    first = f", {t.remat_first} in the first {t.remat_first_layers}" if t.remat_first_layers else ""
    return f"{t.remat}{first}{''.join(f', {name} to the host' for name in t.offload)}"


def mesh_axes(*meshes: MeshConfig) -> tuple[str, ...]:
    """Return the axes that are named: sequence only where one of the `meshes` has it."""
    return ("data", "fsdp", "tensor") + (("sequence",) if any(m.sequence > 1 for m in meshes) else ())


def mesh_text(config: RunConfig) -> str:
    """Return the size of each mesh axis, with -1 worked out."""
    sizes = {axis: getattr(config.mesh, axis) for axis in mesh_axes(config.mesh)}
    rest = slice_of(config).devices // max(1, math.prod(n for n in sizes.values() if n > 0))
    return " x ".join(f"{axis} {rest if n == -1 else n}" for axis, n in sizes.items())


def buffer_text(b: dict) -> str:
    """Return size, shape and origin of a buffer."""
    return f"{b['bytes'] / GiB:6.2f} GiB  {b['shape']}  {_origin(b['what']) or b['name']}"


def _origin(op_name: str) -> str:
    """Shorten `jit(train_step)/while/body/transpose(jvp())/.../dot_general` to `backward: dot_general`."""
    if not op_name.startswith("jit("):
        return op_name.removeprefix("state.")
    phase = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else "update"
    phase = "recomputed" if "rematted" in op_name else phase
    ends = [x for x in op_name.split("/")[1:] if x not in ("while", "body", "closed_call", "checkpoint", "pallas_call")]
    return f"{phase}: {'/'.join(ends[-2:] if 'dot_general' in op_name else ends[-1:]) or 'carried by a loop'}"


def misfit_text(config: RunConfig, misfit: dict) -> str:
    """Return by how much the config does not fit, and the largest buffers."""
    needed, available = misfit["needed"], misfit["available"]
    amount = f" by {(needed - available) / GiB:.1f} GiB: {needed / GiB:.1f} of {available / GiB:.1f}" if needed else ""
    listed = "".join(f"\n{'':<12} {buffer_text(b)}" for b in misfit["buffers"][:5])
    return f"{config.mesh.slice}: {settings_text(config)}: does not fit{amount}" + (
        f"; largest:{listed}" if listed else ""
    )


def ranking(fits: list[tuple[RunConfig, dict]]) -> Table:
    """Make the table of a search: a row for each config, in their order."""
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for heading in ("", "mesh", "a chip", "accum.", "remat", "GiB", "step s", "waiting", "MFU", "days"):
        # On a narrow terminal the text of this column is broken, and no number is cut off.
        words = heading in ("mesh", "remat")
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "remat", overflow="fold")
    axes = mesh_axes(*(c.mesh for c, _ in fits))
    for rank, (c, p) in enumerate(fits, 1):
        step = p["step"]
        table.add_row(
            str(rank), " x ".join(str(getattr(c.mesh, axis)) for axis in axes),
            f"{p['sequences_a_chip'] / c.train.accumulation_steps:g}", str(c.train.accumulation_steps), remat_text(c),
            f"{p['memory']['peak'] / GiB:.1f}", f"{step['seconds']:.2f}", f"{step['factor'] * step['waiting']:.2f}",
            f"{p['mfu']:.1%}", f"{p['days']:.1f}",
        )  # fmt: skip
    table.caption = f"mesh: {' x '.join(axes)}; a chip: sequences at a time"
    return table


def comparison(configs: dict[str, RunConfig], plans: dict[str, dict]) -> Table:
    """Make the table of a comparison: a column for each config, a row for each number that decides between them."""
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for name in configs:
        table.add_column(name, justify="right")

    def row(label: str, text: Callable[[dict], str]):
        table.add_row(label, *("does not fit" if "does_not_fit" in p else text(p) for p in plans.values()))

    for key in ("slice", *mesh_axes(*(c.mesh for c in configs.values()))):
        table.add_row(key, *(str(getattr(c.mesh, key)) for c in configs.values()))
    for key in ("batch_size", "accumulation_steps"):
        table.add_row(key.replace("_", " "), *(str(getattr(c.train, key)) for c in configs.values()))
    table.add_row("remat", *map(remat_text, configs.values()))
    row("peak GiB", lambda p: f"{p['memory']['peak'] / GiB:.1f} of {p['memory']['available'] / GiB:.1f}")
    row("step s", lambda p: f"{p['step']['seconds']:.2f}")
    for key, label in _KINDS.items():
        row(f"  {label}", lambda p, key=key: f"{p['step']['factor'] * p['step'][key]:.2f}")
    row("tokens/s", lambda p: tokens_text(p["tokens_per_second"]))
    row("MFU", lambda p: f"{p['mfu']:.1%}")
    row("days", lambda p: f"{p['days']:.1f}")
    row("chip-hours", lambda p: f"{p['chip_hours']:,.0f}")
    if any(p.get("cost") is not None for p in plans.values()):
        row("cost", lambda p: f"{p['cost']:,.0f}")
    return table
