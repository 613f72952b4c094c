"""A plan as a person reads it."""

from rich.console import Console

from easylm_mling.config import RunConfig
from easylm_mling.metrics import tokens_text
from easylm_mling.plan.slices import GiB

_KINDS = {
    "matrix": "matrix products",
    "other": "other compute",
    "attention": "attention",
    "waiting": "waiting for chips",
}


def print_plan(config: RunConfig, plan: dict, console: Console):
    def line(label: str, text: str):
        console.print(f" {label:<11} {text}", highlight=False, soft_wrap=True)

    step, memory = plan["step"], plan["memory"]
    console.print(heading(config, plan), highlight=False, soft_wrap=True)
    free, share = memory["free"] / GiB, memory["peak"] / memory["available"]
    line(
        "fits",
        f"{memory['peak'] / GiB:.1f} of {memory['available'] / GiB:.1f} GiB a chip at the peak ({share:.0%}), {free:.1f} free; largest:",
    )
    for b in plan["buffers"]:
        line("", buffer_text(b))
    parts = ", ".join(f"{what} {step['factor'] * step[k]:.2f}" for k, what in _KINDS.items())
    line("step", f"{step['seconds']:.2f} s: {parts}")
    line(
        "speed",
        f"{tokens_text(plan['tokens_per_second'])} tokens/s; MFU {plan['mfu']:.1%} ({plan['mfu_hidden']:.1%} without waiting); "
        f"{plan['hardware_flops_per_model_flop']:.2f} FLOPs done for each that the model needs",
    )
    cost = "" if plan["cost"] is None else f", {plan['cost']:,.0f} at the given price"
    line(
        "budget",
        f"{tokens_text(config.train.budget_tokens)} tokens in {plan['days']:.1f} days; {plan['chip_hours']:,.0f} chip-hours{cost}",
    )
    line("checkpoint", f"{plan['checkpoint']['bytes'] / 1e9:.1f} GB, {plan['checkpoint']['seconds']:.0f} s")
    data = plan["data_a_host"]
    line(
        "data",
        f"{tokens_text(data['tokens_per_second'])} tokens/s a host, {data['bytes_per_second'] / 1e6:.2f} MB/s of text",
    )
    for i, text in enumerate(plan["assumptions"]):
        line("assumed" if i == 0 else "", text)


def heading(config: RunConfig, plan: dict) -> str:
    t = config.train
    return (
        f"{plan['slice']}: {plan['chips']} chips on {plan['hosts']} hosts; {settings_text(config)}; "
        f"{t.batch_size} sequences of {config.data.sequence_length} a step"
    )


def settings_text(config: RunConfig) -> str:
    mesh = " x ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in ("data", "fsdp", "tensor"))
    return f"{mesh}; remat {config.train.remat}; accumulation {config.train.accumulation_steps}"


def buffer_text(b: dict) -> str:
    return f"{b['bytes'] / GiB:6.2f} GiB  {b['shape']}  {b['what'] or b['name']}"
