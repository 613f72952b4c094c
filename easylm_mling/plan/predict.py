"""Predict from a measurement what a person decides by: whether it fits, its speed, days and cost."""

from easylm_mling.config import RunConfig
from easylm_mling.model.flops import model_flops
from easylm_mling.model.params import parameter_count
from easylm_mling.plan.schedule import HOST_BYTES
from easylm_mling.plan.slices import Slice, find_slice

# Assumed, and said so in every plan.
CHECKPOINT_BYTES_A_HOST = 0.5e9  # written to a bucket in a second
TEXT_BYTES_A_TOKEN = 4.0


def predict(config: RunConfig, measured: dict, factor: float = 1.0, price: float | None = None) -> dict:
    """Seconds, bytes, rates and cost of the run, from `measure`'s result. `factor`: measured over predicted step time of an
    earlier run (see plan/calibrate.py); `price`: of one chip for one hour."""
    where = find_slice(config.mesh.slice or "")
    times, rows, T = measured["times"], config.train.batch_size, config.data.sequence_length
    hidden = times["matrix"] + times["other"] + times["attention"]
    paid = hidden + times["waiting"]
    step = factor * paid
    wanted = model_flops(config.model, T) * rows / where.chips  # FLOPs a step and chip
    seconds = step * config.total_steps
    chip_hours = seconds / 3600 * where.chips
    state = 12 * parameter_count(config.model)
    rate = config.tokens_per_step / step
    available = where.chip.hbm_bytes
    return {
        "slice": where.name,
        "chips": where.chips,
        "hosts": where.hosts,
        "sequences_a_chip": rows / where.chips,
        "memory": {**measured["memory"], "available": available, "free": available - measured["memory"]["peak"]},
        "buffers": measured["buffers"],
        "step": {k: times[k] for k in ("matrix", "other", "attention", "waiting")}
        | {"hidden": hidden, "paid": paid, "factor": factor, "seconds": step},
        "seconds_a_sequence": {"hidden": hidden * where.chips / rows, "paid": paid * where.chips / rows},
        "tokens_per_second": rate,
        "mfu": wanted / step / where.chip.peak_flops,
        "mfu_hidden": wanted / hidden / where.chip.peak_flops,
        "hardware_flops_per_model_flop": (times["product_flops"] + times["kernel_flops"]) / wanted,
        "days": seconds / 86400,
        "chip_hours": chip_hours,
        "cost": None if price is None else chip_hours * price,
        "checkpoint": {"bytes": state, "seconds": state / where.hosts / CHECKPOINT_BYTES_A_HOST},
        "data_a_host": {
            "tokens_per_second": rate / where.hosts,
            "bytes_per_second": rate / where.hosts * TEXT_BYTES_A_TOKEN,
        },
        "collectives": measured["collectives"],
        "kernels": measured["kernels"],
        "assumptions": assumptions(where, factor, bool(config.train.offload)),
    }


def assumptions(where: Slice, factor: float, offload: bool = False) -> list[str]:
    c = where.chip
    lines = [
        f"compute: the compiler's cycles at {c.clock_hz / 1e9:g} GHz; peak {c.peak_flops / 1e12:g} TFLOP/s in bf16",
        f"collectives: one ring on one axis of the torus, {c.link_bytes / 1e9:g} GB/s, one after another"
        + (f"; between slices {c.dcn_bytes / 1e9:g} GB/s a chip" if where.count > 1 else "")
        + (f"; to and from the host {HOST_BYTES / 1e9:g} GB/s a chip" if offload else ""),
        "attention kernels: the compiler's instruction bundles, without waiting for memory",
        f"checkpoints: {CHECKPOINT_BYTES_A_HOST / 1e9:g} GB/s a host; text: {TEXT_BYTES_A_TOKEN:g} bytes a token",
        "not counted: the host's work, evaluation, checkpoints, restarts",
    ]
    return lines + ([f"step time times {factor:.3f}, as measured in an earlier run"] if factor != 1.0 else [])
