"""Predict from a measurement what a person decides by: whether it fits, its speed, days and cost."""

from easylm_mling.config import RunConfig, TrainConfig
from easylm_mling.model.flops import model_flops
from easylm_mling.model.params import trained_count
from easylm_mling.plan.kernels import LIKE
from easylm_mling.plan.schedule import HOST_BYTES
from easylm_mling.plan.slices import Slice, slice_of

# Assumptions, which every plan lists.
CHECKPOINT_BYTES_A_HOST = 0.5e9  # written to a bucket each second
TEXT_BYTES_A_TOKEN = 4.0


def predict(config: RunConfig, measured: dict, factor: float = 1.0, price: float | None = None) -> dict:
    """Return the plan: seconds, bytes, rates and cost of the run, from `measure`'s result.

    `factor` is the measured over the predicted step time of an earlier run (plan/calibrate.py), `price` that of a chip-hour.
    """
    target = slice_of(config)
    times, rows, T = measured["times"], config.train.batch_size, config.data.sequence_length
    hidden = times["matrix"] + times["other"] + times["attention"]
    paid = hidden + times["waiting"]
    step = factor * paid
    needed_flops = model_flops(config.model, T, config.lora) * rows / target.devices  # a step and device
    seconds = step * config.total_steps
    chip_hours = seconds / 3600 * target.chips
    state = 12 * trained_count(config.model, config.lora)
    rate = config.tokens_per_step / step
    available = target.chip.hbm_bytes
    return {
        "slice": target.name,
        "chips": target.chips,
        "devices": target.devices,
        "hosts": target.hosts,
        "sequences_a_chip": rows / target.chips,
        "memory": {**measured["memory"], "available": available, "free": available - measured["memory"]["peak"]},
        "buffers": measured["buffers"],
        "step": {k: times[k] for k in ("matrix", "other", "attention", "waiting")}
        | {"hidden": hidden, "paid": paid, "factor": factor, "seconds": step},
        "seconds_a_sequence": {"hidden": hidden * target.chips / rows, "paid": paid * target.chips / rows},
        "tokens_per_second": rate,
        "mfu": needed_flops / step / target.chip.peak_flops,
        "mfu_hidden": needed_flops / hidden / target.chip.peak_flops,
        "hardware_flops_per_model_flop": (times["product_flops"] + times["kernel_flops"]) / needed_flops,
        "days": seconds / 86400,
        "chip_hours": chip_hours,
        "cost": None if price is None else chip_hours * price,
        "checkpoint": {"bytes": state, "seconds": state / target.hosts / CHECKPOINT_BYTES_A_HOST},
        "data_a_host": {
            "tokens_per_second": rate / target.hosts,
            "bytes_per_second": rate / target.hosts * TEXT_BYTES_A_TOKEN,
        },
        "collectives": measured["collectives"],
        "kernels": measured["kernels"],
        "assumptions": assumptions(target, config.train, factor),
    }


def assumptions(target: Slice, train: TrainConfig, factor: float) -> list[str]:
    """List what the plan takes for granted."""
    c = target.chip
    kinds = train.products.kinds if train.products else ()
    eight_bits = "".join(f", {c.peak_in(kind) / 1e12:g} in {kind}" for kind in kinds)
    like = f" for a {LIKE[c.name]}" if c.name in LIKE else ""
    lines = [
        f"compute: the compiler's cycles at {c.clock_hz / 1e9:g} GHz; peak {c.peak_flops / 1e12:g} TFLOP/s in bf16{eight_bits}"
        + ("" if c.devices == 1 else f" a device, of which a chip is {c.devices}"),
        f"collectives: one ring on one axis of the torus, {c.link_bytes / 1e9:g} GB/s, one after another"
        + (f"; between slices {c.dcn_bytes / 1e9:g} GB/s a {c.unit}" if target.count > 1 else "")
        + (f"; to and from the host {HOST_BYTES / 1e9:g} GB/s a {c.unit}" if train.offload else ""),
        f"attention kernels: the compiler's instruction bundles{like}, at most the peak, without waiting for memory",
        f"checkpoints: {CHECKPOINT_BYTES_A_HOST / 1e9:g} GB/s a host; text: {TEXT_BYTES_A_TOKEN:g} bytes a token",
        "not counted: the host's work, evaluation, checkpoints, restarts",
    ]
    if kinds:
        lines.append(
            "MFU is of the bf16 peak, which products of 8 bits can pass: it compares step times with those without"
        )
    return lines + ([f"step time times {factor:.3f}, as measured in an earlier run"] if factor != 1.0 else [])
