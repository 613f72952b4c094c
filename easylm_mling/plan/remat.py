"""Choose the remat policy, or mixture of two, with the least predicted step time that memory allows.

A mixture keeps more in its first layers. How many layers fit is interpolated between the peaks of its two policies, then
measured, and corrected once by what was measured.
"""

import dataclasses
import math

from rich.console import Console

from easylm_mling.config import REMAT_NAMES, RunConfig
from easylm_mling.errors import ConfigError
from easylm_mling.monitoring.console import say
from easylm_mling.plan.measurements import MeasurementCache, fastest, fits, peak_bytes, step_seconds
from easylm_mling.plan.slices import find_slice

_BASES = 2  # of the policies that fit, the fastest: what a mixture builds on
_LESS = "more accumulation steps or a larger slice would need less"


def with_remat(config: RunConfig, policy: str, first: str = "none", layers: int = 0) -> RunConfig:
    changed = dataclasses.replace(config.train, remat=policy, remat_first=first, remat_first_layers=layers)
    return dataclasses.replace(config, train=changed)


def fill_memory(config: RunConfig, book: MeasurementCache, console: Console) -> list[RunConfig]:
    """The config with every uniform policy and the mixtures between those that fit and those that do not: all measured in
    `book`. A peak of more than `train.remat_memory` of the chip's memory does not fit."""
    limit = config.train.remat_memory * find_slice(config.mesh.slice or "").chip.hbm_bytes
    layers = config.model.num_hidden_layers
    # A layer that keeps everything sends nothing to the host.
    uniform = {p: with_remat(config, p) for p in REMAT_NAMES if p != "none" or not config.train.offload}
    book.measure(list(uniform.values()), console)
    peaks = {p: peak for p, c in uniform.items() if (peak := peak_bytes(book.get(c))) is not None}
    fitting = [p for p in peaks if fits(uniform[p], book.get(uniform[p]))]
    bases = sorted(fitting, key=lambda p: step_seconds(book.get(uniform[p])))[:_BASES]
    mixtures = {}
    for base in bases:
        for first in (p for p, peak in peaks.items() if peak > limit):
            a_layer = (peaks[first] - peaks[base]) / layers
            if (count := int((limit - peaks[base]) / a_layer)) > 0:
                mixtures[base, first] = with_remat(config, base, first, min(count, layers - 1)), a_layer
    book.measure([c for c, _ in mixtures.values()], console)
    corrected = [c for c in (_corrected(mixture, a_layer, limit, book) for mixture, a_layer in mixtures.values()) if c]
    book.measure(corrected, console)
    return [*uniform.values(), *(c for c, _ in mixtures.values()), *corrected]


def _corrected(mixture: RunConfig, a_layer: float, limit: float, book: MeasurementCache) -> RunConfig | None:
    """The mixture with as many layers as its measured peak leaves room for; None where it had that many already."""
    peak, t = peak_bytes(book.get(mixture)), mixture.train
    if peak is None:
        return None
    layers = min(t.remat_first_layers + math.floor((limit - peak) / a_layer), mixture.model.num_hidden_layers - 1)
    if layers == t.remat_first_layers or layers < 1:
        return None
    return with_remat(mixture, t.remat, t.remat_first, layers)


def choose_remat(config: RunConfig, book: MeasurementCache, console: Console) -> RunConfig:
    """The config with `train.remat: auto` replaced by the fastest policy or mixture that fits; any other as it is.

    Raises ConfigError where nothing fits, or what `plan` raises.
    """
    if config.train.remat != "auto":
        return config
    find_slice(config.mesh.slice or "")
    tried = fill_memory(config, book, console)
    fitting = fastest(tried, book)
    if not fitting:
        errors = [m["error"] for m in (book.get(c) for c in tried) if "error" in m]
        raise ConfigError(
            errors[0] if errors else f"train.remat=auto: nothing fits a chip of {config.mesh.slice}; {_LESS}"
        )
    best, t = fitting[0], fitting[0].train
    first = (
        f" train.remat_first={t.remat_first} train.remat_first_layers={t.remat_first_layers}"
        if t.remat_first_layers
        else ""
    )
    say(console, f"train.remat=auto is train.remat={t.remat}{first}")
    return best
