"""From weights to shares: of the sources in the mixture, stage by stage, and of the languages in a source.

All shares and rates are integers in units of 2**-32, so that schedules are exact and the same on every host.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from easylm_mling.config import RunConfig
from easylm_mling.data.catalog import Catalog, Source
from easylm_mling.errors import ConfigError

ONE = 1 << 32

# Source -> language -> tokens in a byte of the catalog, as data/estimates.py finds them.
TokensPerByte = dict[str, dict[str, float]]


@dataclass(frozen=True)
class MixingPlan:
    """How often each source, and each language in it, is due.

    `starts`: the first round (a row of every lane) of each stage, from 0. `shares`: for each stage, the sources' shares
    of 2**32. `language_rates`: for each source, int64 [languages]: how often a language stands in an epoch.
    """

    starts: tuple[int, ...]
    shares: tuple[list[int], ...]
    language_rates: dict[str, np.ndarray]

    def shares_at(self, turn: int) -> list[int]:
        """The sources' shares of round number `turn`."""
        return self.shares[bisect_right(self.starts, turn) - 1]

    def target(self, rounds: int) -> list[int]:
        """Rows that a lane is due of each source in the first `rounds` rounds, in units of 2**-32."""
        ends = [min(end, rounds) for end in (*self.starts[1:], rounds)]
        lengths = [max(0, end - start) for start, end in zip(self.starts, ends, strict=True)]
        return [sum(n * s for n, s in zip(lengths, of, strict=True)) for of in zip(*self.shares, strict=True)]


def make_plan(config: RunConfig, catalog: Catalog, tokens_per_byte: TokensPerByte | None) -> MixingPlan:
    """The plan of a run; `tokens_per_byte` is not needed where `needs_estimates` says so."""
    assert tokens_per_byte is not None or not needs_estimates(config)
    tokens = {n: language_tokens(s, (tokens_per_byte or {}).get(n, {})) for n, s in catalog.sources.items()}
    starts, shares = _stages(config, catalog, tokens)
    plan = MixingPlan(starts, shares, {})
    rows = config.total_steps * config.train.batch_size
    due = plan.target(rows // config.lanes)
    for i, (name, source) in enumerate(catalog.sources.items()):
        wanted = due[i] / ONE * config.lanes * config.data.sequence_length
        plan.language_rates[name] = language_rates(source, tokens[name], wanted)
    return plan


def needs_estimates(config: RunConfig) -> bool:
    by = config.data.weighting.by
    return by not in ("number", "bytes") or any(s.language_by != "bytes" for s in config.data.sources.values())


def language_bytes(source: Source) -> list[float]:
    """The catalog's bytes of each language, in the order of `source.languages`."""
    sizes = np.bincount(source.unit_languages, weights=source.units[:, 3], minlength=len(source.languages))
    return sizes.tolist()


def language_tokens(source: Source, tokens_per_byte: dict[str, float]) -> list[float]:
    """Estimated tokens of each language, every document that is trained on counted once."""
    fraction = source.settings["sample_fraction"]
    rates = [tokens_per_byte.get(language, 0.0) * fraction for language in source.languages]
    return [size * rate for size, rate in zip(language_bytes(source), rates, strict=True)]


def integer_weights(weights: list[float]) -> list[int]:
    """Weights as shares of 2**32 that sum to it exactly, so that schedules need no rounding. Zero stays zero."""
    total = sum(weights)
    exact = [weight / total * ONE for weight in weights]
    shares = [int(x) for x in exact]
    by_remainder = sorted((i for i, w in enumerate(weights) if w > 0), key=lambda i: (shares[i] - exact[i], i))
    for n in range(ONE - sum(shares)):
        shares[by_remainder[n % len(by_remainder)]] += 1
    return shares


def spread(sizes: list[float], total: float, temperature: float, cap: float) -> list[float]:
    """How often each of `sizes` is taken, so that sizes ** temperature share out `total`, but none more than `cap` times.

    What one over the cap gives up is shared out among the rest; temperature 0 is UniMax (arXiv:2304.09151). Where the
    cap leaves too little of all of them, every one is taken `cap` times.
    """
    free, rates, left = [i for i, size in enumerate(sizes) if size > 0], [float(cap)] * len(sizes), total
    while free:
        # Python's power, not numpy's: the vectorised one may differ between processors in the last bit.
        scale = left / sum(sizes[i] ** temperature for i in free)
        wanted = {i: scale * sizes[i] ** temperature / sizes[i] for i in free}
        over = [i for i in free if wanted[i] > cap]
        left -= sum(cap * sizes[i] for i in over)
        free = [i for i in free if wanted[i] <= cap] if over else []
        if not over:
            for i, rate in wanted.items():
                rates[i] = rate
    return rates


def language_rates(source: Source, tokens: list[float], wanted: float) -> np.ndarray:
    """int64 [languages]: how often a language stands in an epoch on average, which keeps the source's size.

    `tokens`: each language's, or empty if they are not known: what is not weighted by bytes then comes as it is.
    `wanted`: what the whole run is to take of the source, for UniMax.
    """
    by, count = source.settings["language_by"], len(source.languages)
    temperature = source.settings["language_temperature"]
    if count == 1 or (temperature == 1 and by != "unimax") or (by != "bytes" and not tokens):
        return np.full(count, ONE, np.int64)
    if by == "unimax":
        epochs = spread(tokens, wanted, 0.0, source.settings["max_epochs"])
        whole = sum(n * size for n, size in zip(epochs, tokens, strict=True)) / max(sum(tokens), 1e-9)
        rates = [n / whole for n in epochs] if whole > 0 else [1.0] * count
    else:
        sizes = language_bytes(source) if by == "bytes" else tokens
        rates = spread(sizes, sum(sizes), temperature, source.settings["language_max_repeats"])
    return np.array([max(1, round(rate * ONE)) for rate in rates], np.int64)


def planned_as_if(plan: MixingPlan, lanes: int, rounds: int) -> np.ndarray:
    """int64 [V, S]: rows by lane and source as if the plan had held from the start, whole and `rounds` to a lane.

    For a run whose sources have changed: nothing is owed for the past. Phases that differ between lanes keep each
    source's total within two rows of its target.
    """
    edges = np.array([0, *accumulate(plan.target(rounds))], dtype=object)
    phases = np.array([lane * ONE // lanes for lane in range(lanes)], dtype=object)
    return np.diff((edges[None, :] + phases[:, None]) // ONE, axis=1).astype(np.int64)


def _stages(config: RunConfig, catalog: Catalog, tokens: dict) -> tuple[tuple[int, ...], tuple[list[int], ...]]:
    data = config.data
    if data.weighting.by != "number":
        return (0,), (integer_weights(_natural_weights(config, catalog, tokens)),)
    weights = {0: [source.weight or 0.0 for source in data.sources.values()]}
    for stage in data.stages:
        # The first round that begins at from_tokens or later; of two stages in one round, the later one holds.
        weights[-(-stage.from_tokens // (config.lanes * data.sequence_length))] = data.stage_weights(stage)
    return tuple(weights), tuple(integer_weights(w) for w in weights.values())


def _natural_weights(config: RunConfig, catalog: Catalog, tokens: dict) -> list[float]:
    how, used = config.data.weighting, [s.weight is None for s in config.data.sources.values()]
    if how.by == "bytes":
        sizes = [sum(language_bytes(s)) * s.settings["sample_fraction"] for s in catalog.sources.values()]
    else:
        sizes = [sum(tokens[name]) for name in catalog.sources]
        if not any(size for size, use in zip(sizes, used, strict=True) if use):
            raise ConfigError(
                f"data.weighting.by={how.by}: no good document was found in a sample of any source, so nothing is known of their "
                "tokens; look at the files with `data inspect`, or give weights (data.weighting.by=number)"
            )
    sizes = [size if use else 0.0 for size, use in zip(sizes, used, strict=True)]
    if how.by == "temperature":
        return [size**how.temperature if size else 0.0 for size in sizes]
    if how.by == "unimax":
        epochs = spread(sizes, config.train.budget_tokens, 0.0, how.max_epochs)
        return [n * size for n, size in zip(epochs, sizes, strict=True)]
    return sizes


def first_epoch_after(rates: np.ndarray, phases: np.ndarray, cap: int) -> int:
    """The first epoch that holds nothing any more when no unit may stand more than `cap` times in all of them."""
    return max(-((p - cap * ONE) // r) for r, p in zip(rates.tolist(), phases.tolist(), strict=True))
