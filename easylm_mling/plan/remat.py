"""Choose the remat policy, or mixture of two, with the least predicted step time that memory allows.

A mixture keeps more in its first layers. How many layers fit is interpolated between the peaks of its two policies, then
measured, and corrected once by what was measured.
"""

import dataclasses
import math

from rich.console import Console

from easylm_mling.config import REMAT_NAMES, RunConfig
from easylm_mling.errors import ConfigError
from easylm_mling.model.layer_kinds import layer_kinds, runs
from easylm_mling.monitoring.console import say
from easylm_mling.plan.measurements import MeasurementCache, fastest, fits, peak_bytes, step_seconds
from easylm_mling.plan.slices import slice_of

_BASES = 2  # mixtures build on so many of the fastest policies that fit
_LESS = "more accumulation steps or a larger slice would need less"


def with_remat(config: RunConfig, policy: str, first: str = "none", layers: int = 0) -> RunConfig:
    """Return the config with the remat `policy`, and with `first` in its first `layers`."""
    changed = dataclasses.replace(config.train, remat=policy, remat_first=first, remat_first_layers=layers)
    return dataclasses.replace(config, train=changed)


def fill_memory(config: RunConfig, cache: MeasurementCache, console: Console) -> list[RunConfig]:
    """Return the config with every uniform policy and with the mixtures that fill the memory, all measured in `cache`.

    A mixture joins a policy that fits and one that does not. A peak over `train.remat_memory` of the chip's does not fit.
    """
    limit = config.train.remat_memory * slice_of(config).chip.hbm_bytes
    layers = config.model.num_hidden_layers
    # A layer that keeps everything sends nothing to the host.
    uniform = {p: with_remat(config, p) for p in REMAT_NAMES if p != "none" or not config.train.offload}
    cache.measure(list(uniform.values()), console)
    peaks = {p: peak for p, c in uniform.items() if (peak := peak_bytes(cache.get(c))) is not None}
    fitting = [p for p in peaks if fits(uniform[p], cache.get(uniform[p]))]
    bases = sorted(fitting, key=lambda p: step_seconds(cache.get(uniform[p])))[:_BASES]
    mixtures = {}
    for base in bases:
        for first in (p for p, peak in peaks.items() if peak > limit):
            a_layer = (peaks[first] - peaks[base]) / layers
            if (count := _whole_periods(config, min(int((limit - peaks[base]) / a_layer), layers - 1))) > 0:
                mixtures[base, first] = with_remat(config, base, first, count), a_layer
    cache.measure([c for c, _ in mixtures.values()], console)
    corrected = [c for c in (_corrected(mixture, a_layer, limit, cache) for mixture, a_layer in mixtures.values()) if c]
    cache.measure(corrected, console)
    return [*uniform.values(), *(c for c, _ in mixtures.values()), *corrected]


def _corrected(mixture: RunConfig, a_layer: float, limit: float, cache: MeasurementCache) -> RunConfig | None:
    """Return the mixture with as many layers as its measured peak leaves room for; None where it has as many already."""
    peak, t = peak_bytes(cache.get(mixture)), mixture.train
    if peak is None:
        return None
    layers = t.remat_first_layers + math.floor((limit - peak) / a_layer)
    layers = _whole_periods(mixture, min(layers, mixture.model.num_hidden_layers - 1))
    if layers == t.remat_first_layers or layers < 1:
        return None
    return with_remat(mixture, t.remat, t.remat_first, layers)


def _whole_periods(config: RunConfig, layers: int) -> int:
    """Return the most of `layers` that are whole periods of the pattern of layers: others would be compiled one by one."""
    return layers - layers % len(runs(layer_kinds(config.model))[0].kinds)


def choose_remat(config: RunConfig, cache: MeasurementCache, console: Console) -> RunConfig:
    """Return the config with `train.remat: auto` replaced by the fastest policy or mixture that fits; any other as it is.

    Raises ConfigError where nothing fits or nothing compiles.
    """
    if config.train.remat != "auto":
        return config
    tried = fill_memory(config, cache, console)
    fitting = fastest(tried, cache)
    if not fitting:
        errors = [m["error"] for m in (cache.get(c) for c in tried) if "error" in m]
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
