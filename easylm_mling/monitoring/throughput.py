"""How fast a run is, as its first process sees it: time, FLOPs and memory in a line of metrics.jsonl."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jax.sharding import Mesh

from easylm_mling.config import RunConfig
from easylm_mling.hardware import chip_of
from easylm_mling.model.flops import model_flops


class Pause:
    """How many `seconds` the loop stood still, known when the pause is over."""

    seconds = 0.0


class Throughput:
    """Measures from one logged step to the next. The first step of a process, which waits for compilation, is left out."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.device, self.devices = mesh.local_devices[0], mesh.size
        self._tokens = config.tokens_per_step
        chip = chip_of(self.device.device_kind)
        devices = chip.devices if chip else 1  # of one chip
        self._chips = mesh.size / devices
        self._tflops = step_flops_per_chip(config, self._chips) / 1e12
        self._peak_tflops = chip and chip.peak_flops * devices / 1e12
        self._measured: tuple[int, float] | None = None  # the last step, and when
        self._paused = self._waited = 0.0

    @contextmanager
    def pausing(self) -> Iterator[Pause]:
        """Leave the time within it (an evaluation, a save) out of the steps. Let the step in flight end before."""
        pause, begun = Pause(), time.monotonic()
        yield pause
        pause.seconds = time.monotonic() - begun
        self._paused += pause.seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within it as waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    def measure(self, step: int) -> dict[str, float | None]:
        """Means of the steps since the last call up to `step`, and the memory of one device in bytes.

        MFU is over the chip's bf16 peak, where the chip is known. FLOPs are those that the model needs (model/flops.py).
        """
        now, memory = time.monotonic(), self.device.memory_stats() or {}
        values: dict[str, float | None] = {"step_seconds": None, "data_wait_seconds": None, "tokens_per_second": None}
        if self._measured and step > self._measured[0]:
            steps = step - self._measured[0]
            seconds = max(1e-9, now - self._measured[1] - self._paused) / steps
            rate, tflops = self._tokens / seconds, self._tflops / seconds
            values = {
                "step_seconds": round(seconds, 6),
                "data_wait_seconds": round(self._waited / steps, 6),
                "tokens_per_second": round(rate, 1),
                "tokens_per_second_per_chip": round(rate / self._chips, 1),
                "tflops_per_chip": float(f"{tflops:.5g}"),
            }
            if self._peak_tflops:
                values["mfu"] = round(tflops / self._peak_tflops, 5)
        self._measured, self._paused, self._waited = (step, now), 0.0, 0.0
        for name, key in (("hbm_bytes", "bytes_in_use"), ("hbm_peak_bytes", "peak_bytes_in_use")):
            if key in memory:
                values[name] = memory[key]
        return values


def step_flops_per_chip(config: RunConfig, chips: float) -> float:
    """FLOPs that the model needs in one step, a chip."""
    return model_flops(config.model, config.data.sequence_length, config.lora) * config.train.batch_size / chips
