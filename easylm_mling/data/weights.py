"""From weights to shares: of the sources in the mixture, stage by stage, and of the languages in a source.

Shares and rates are integers in units of 2**-32, so that schedules are exact and the same on every host.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from easylm_mling.config import MixerConfig
from easylm_mling.data.catalog import Catalog, Source
from easylm_mling.errors import ConfigError

ONE = 1 << 32


class Rate(NamedTuple):
    """Bytes of text, and tokens, per byte of the catalog, whose bytes are of a format's packing, too."""

    text: float
    tokens: float


# Source -> language -> rate, estimated by data/estimates.py.
Rates = dict[str, dict[str, Rate]]
_UNKNOWN = Rate(0.0, 0.0)


@dataclass(frozen=True)
class MixingPlan:
    """How often each source, and each language in it, is read.

    `starts`: the first round of each stage, from 0; a round is one row of every lane. `shares`: for each stage, the
    sources' shares, which sum to 2**32. `language_rates`: for each source, int64 [languages] in units of 2**-32, how
    often a language is read in an epoch.
    """

    starts: tuple[int, ...]
    shares: tuple[list[int], ...]
    language_rates: dict[str, np.ndarray]

    def shares_at(self, turn: int) -> list[int]:
        """Return the sources' shares of round number `turn`, in units of 2**-32."""
        return self.shares[bisect_right(self.starts, turn) - 1]

    def target(self, rounds: int) -> list[int]:
        """Return the rows that a lane should get of each source in the first `rounds` rounds, in units of 2**-32."""
        ends = [min(end, rounds) for end in (*self.starts[1:], rounds)]
        lengths = [max(0, end - start) for start, end in zip(self.starts, ends, strict=True)]
        return [sum(n * s for n, s in zip(lengths, of, strict=True)) for of in zip(*self.shares, strict=True)]


def make_plan(config: MixerConfig, catalog: Catalog, estimated: Rates | None) -> MixingPlan:
    """Return the plan of a run; `estimated` may be None unless `needs_estimates(config)`."""
    assert estimated is not None or not needs_estimates(config)
    rates = estimated or {}
    tokens = {n: language_tokens(s, rates.get(n, {})) for n, s in catalog.sources.items()}
    texts = {n: language_text(s, rates.get(n, {})) for n, s in catalog.sources.items()}
    starts, shares = _stages(config, texts if config.data.weighting.by == "bytes" else tokens)
    plan = MixingPlan(starts, shares, {})
    rows = config.total_steps * config.batch_size
    lane_rows = plan.target(rows // config.lanes)
    for i, (name, source) in enumerate(catalog.sources.items()):
        budget = lane_rows[i] / ONE * config.lanes * config.data.sequence_length
        plan.language_rates[name] = language_rates(source, tokens[name], budget, texts[name])
    return plan


def needs_estimates(config: MixerConfig) -> bool:
    """Return True if shares depend on how much text, or how many tokens, the sources or languages hold."""
    flattened = (s.language_by != "bytes" or s.language_temperature != 1 for s in config.data.sources.values())
    return config.data.weighting.by != "number" or any(flattened)


def language_bytes(source: Source) -> list[float]:
    """Return the catalog's bytes of each language, in the order of `source.languages`."""
    sizes = np.bincount(source.unit_languages, weights=source.units[:, 3], minlength=len(source.languages))
    return sizes.tolist()


def language_text(source: Source, rates: dict[str, Rate]) -> list[float]:
    """Return the estimated bytes of text of each language, every document that is trained on counted once."""
    fraction = source.settings["sample_fraction"]
    texts = [rates.get(language, _UNKNOWN).text * fraction for language in source.languages]
    return [size * text for size, text in zip(language_bytes(source), texts, strict=True)]


def language_tokens(source: Source, rates: dict[str, Rate]) -> list[float]:
    """Return the estimated tokens of each language, every document that is trained on counted once."""
    fraction = source.settings["sample_fraction"]
    tokens = [rates.get(language, _UNKNOWN).tokens * fraction for language in source.languages]
    return [size * rate for size, rate in zip(language_bytes(source), tokens, strict=True)]


def integer_weights(weights: list[float]) -> list[int]:
    """Return the weights as shares that sum to 2**32 exactly, so that schedules need no rounding. Zero stays zero."""
    total = sum(weights)
    if total == math.inf:
        weights = [weight / len(weights) / 2 for weight in weights]
        total = sum(weights)
    exact = [weight / total * ONE for weight in weights]
    shares = [int(x) for x in exact]
    by_remainder = sorted((i for i, w in enumerate(weights) if w > 0), key=lambda i: (shares[i] - exact[i], i))
    for n in range(ONE - sum(shares)):
        shares[by_remainder[n % len(by_remainder)]] += 1
    return shares


def spread(sizes: list[float], total: float, temperature: float, cap: float) -> list[float]:
    """Return how often each of `sizes` is read, so that they divide `total` as size ** temperature, each at most `cap` times.

    What one over the cap cannot take goes to the others; temperature 0 is UniMax (arXiv:2304.09151). Where all of them
    at the cap hold less than `total`, each is read `cap` times.
    """
    free, rates, left = [i for i, size in enumerate(sizes) if size > 0], [float(cap)] * len(sizes), total
    while free:
        # Python's power, not numpy's: the vectorised one may differ between processors in the last bit.
        scale = left / sum(sizes[i] ** temperature for i in free)
        uncapped = {i: scale * sizes[i] ** temperature / sizes[i] for i in free}
        over = [i for i in free if uncapped[i] > cap]
        left -= sum(cap * sizes[i] for i in over)
        free = [i for i in free if uncapped[i] <= cap] if over else []
        if not over:
            for i, rate in uncapped.items():
                rates[i] = rate
    return rates


def language_rates(source: Source, tokens: list[float], budget: float, texts: list[float] | None = None) -> np.ndarray:
    """Return how often each language is read in an average epoch, int64 [languages] in units of 2**-32.

    An epoch keeps the source's size. `tokens`: each language's, or empty if unknown; then only weights by bytes have an
    effect. `texts`: each language's bytes of text; by default the catalog's. `budget`: the tokens that the run takes of the
    source, for UniMax.
    """
    by, count = source.settings["language_by"], len(source.languages)
    temperature = source.settings["language_temperature"]
    if count == 1 or (temperature == 1 and by != "unimax") or (by != "bytes" and not tokens):
        return np.full(count, ONE, np.int64)
    if by == "unimax":
        epochs = spread(tokens, budget, 0.0, source.settings["max_epochs"])
        whole = sum(n * size for n, size in zip(epochs, tokens, strict=True)) / max(sum(tokens), 1e-9)
        rates = [n / whole for n in epochs] if whole > 0 else [1.0] * count
    else:
        sizes = (texts or language_bytes(source)) if by == "bytes" else tokens
        rates = spread(sizes, sum(sizes), temperature, source.settings["language_max_repeats"])
    return np.array([max(1, round(rate * ONE)) for rate in rates], np.int64)


def planned_as_if(plan: MixingPlan, lanes: int, rounds: int) -> np.ndarray:
    """Return rows by lane and source, int64 [V, S], as if the plan had held from the start: `rounds` to a lane.

    For a run whose sources have changed: no source is then behind its share. Each lane has another phase, which keeps
    a source's total within two rows of its target.
    """
    edges = np.array([0, *accumulate(plan.target(rounds))], dtype=object)
    phases = np.array([lane * ONE // lanes for lane in range(lanes)], dtype=object)
    return np.diff((edges[None, :] + phases[:, None]) // ONE, axis=1).astype(np.int64)


def _stages(config: MixerConfig, sizes: dict[str, list[float]]) -> tuple[tuple[int, ...], tuple[list[int], ...]]:
    data = config.data
    if data.weighting.by != "number":
        return (0,), (integer_weights(_natural_weights(config, sizes)),)
    weights = {0: [source.weight or 0.0 for source in data.sources.values()]}
    for stage in data.stages:
        # The first round that begins at from_tokens or later; of two stages in one round, the later one holds.
        weights[-(-stage.from_tokens // (config.lanes * data.sequence_length))] = data.stage_weights(stage)
    return tuple(weights), tuple(integer_weights(w) for w in weights.values())


def _natural_weights(config: MixerConfig, of_languages: dict[str, list[float]]) -> list[float]:
    weighting, used = config.data.weighting, [s.weight is None for s in config.data.sources.values()]
    sizes = [sum(of) for of in of_languages.values()]
    if not any(size for size, use in zip(sizes, used, strict=True) if use):
        raise ConfigError(
            f"data.weighting.by={weighting.by}: no good document was found in a sample of any source, so their sizes "
            "cannot be estimated; look at the files with `data inspect`, or give weights (data.weighting.by=number)"
        )
    sizes = [size if use else 0.0 for size, use in zip(sizes, used, strict=True)]
    if weighting.by == "temperature":
        return [size**weighting.temperature if size else 0.0 for size in sizes]
    if weighting.by == "unimax":
        epochs = spread(sizes, config.budget_tokens, 0.0, weighting.max_epochs)
        return [n * size for n, size in zip(epochs, sizes, strict=True)]
    return sizes


def first_epoch_after(rates: np.ndarray, phases: np.ndarray, cap: int) -> int:
    """Return the first epoch that is empty when no unit may be read more than `cap` times in all epochs together."""
    return max(-((p - cap * ONE) // r) for r, p in zip(rates.tolist(), phases.tolist(), strict=True))
