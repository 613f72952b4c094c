"""A forecast of what a plan takes of every source and language under the token budget, before a token is read.

It computes with a flow instead of rows. Each source flows at its share until a stage begins or it is used up; then its
share goes to the others. Sizes are estimates (see data/estimates.py), and so are all results.
"""

from dataclasses import dataclass

from easylm_mling.config import MixerConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.pool import lanes_with_data
from easylm_mling.data.shuffle import open_orders
from easylm_mling.data.weights import ONE, MixingPlan


@dataclass(frozen=True)
class SourceForecast:
    """In tokens: `size` of all documents once, `taken` by the run, and the run's when it is used up (None: never)."""

    size: float
    taken: float
    used_up_at: float | None
    # For each language: how often all its documents are read.
    language_epochs: list[float]

    @property
    def epochs(self) -> float:
        """How often the source is read."""
        return self.taken / self.size if self.size else 0.0


@dataclass(frozen=True)
class Forecast:
    """`tokens` is the budget, or less if the data ends before. `padding`, in tokens, is an upper bound."""

    tokens: float
    padding: float
    sources: dict[str, SourceForecast]


def forecast(config: MixerConfig, catalog: Catalog, plan: MixingPlan, sizes: dict[str, list[float]]) -> Forecast:
    """Return the forecast for `sizes`, the estimated tokens of each language of each source (weights.language_tokens)."""
    names, lanes = list(catalog.sources), config.lanes
    per_round = lanes * config.data.sequence_length
    budget = config.total_steps * config.tokens_per_step
    rules = [config.data.sources[name] for name in names]
    limits = [rule.max_epochs * sum(sizes[name]) or float("inf") for rule, name in zip(rules, names, strict=True)]
    own_lanes = lanes_with_data(config, open_orders(config, catalog, plan))
    taken, used_up, now = [0.0] * len(names), {}, 0.0
    while now < budget:
        shares = plan.shares_at(int(now / per_round + 1e-6))
        rates = _rates([share / ONE for share in shares], [h / lanes for h in own_lanes], set(used_up))
        if not sum(rates):
            break
        stage_ends = [start * per_round for start in plan.starts if start * per_round > now + 0.5]
        left = {i: (limits[i] - taken[i]) / rate for i, rate in enumerate(rates) if rate}
        span = min(budget - now, min(stage_ends, default=budget) - now, *left.values())
        now += span
        taken = [t + rate * span for t, rate in zip(taken, rates, strict=True)]
        ended = [i for i, room in left.items() if room <= span]
        used_up.update({i: now for i in ended})
        if any(rules[i].when_used_up == "stop" for i in ended):
            break
    sources = {}
    for i, name in enumerate(names):
        rates = [rate / ONE for rate in plan.language_rates[name].tolist()]
        epochs = _language_epochs(sizes[name], rates, rules[i].max_epochs, taken[i])
        sources[name] = SourceForecast(sum(sizes[name]), taken[i], used_up.get(i), epochs)
    # The last row of every lane's stream of a source that ends.
    padding = sum(own_lanes[i] for i in used_up) * config.data.sequence_length
    return Forecast(now, padding, sources)


def _rates(shares: list[float], limits: list[float], used_up: set[int]) -> list[float]:
    """Return the shares of the sources that go on: each at most what its lanes can take, the rest goes to the others."""
    rates, free, left = [0.0] * len(shares), {i for i, s in enumerate(shares) if s and i not in used_up}, 1.0
    while free:
        total = sum(shares[i] for i in free)
        full = {i for i in free if left * shares[i] / total > limits[i] + 1e-12}
        if not full:
            for i in free:
                rates[i] = left * shares[i] / total
            break
        for i in full:
            rates[i] = limits[i]
        left, free = left - sum(limits[i] for i in full), free - full
    return rates


def _language_epochs(sizes: list[float], rates: list[float], cap: int, taken: float) -> list[float]:
    """Return how often each language is read if `taken` tokens of the source are; at most `cap` times, 0: no cap."""
    epoch = sum(rate * size for rate, size in zip(rates, sizes, strict=True))
    if not epoch:
        return [0.0] * len(sizes)
    if not cap:
        return [rate * taken / epoch for rate in rates]
    low, high = 0.0, cap / min(rates)
    for _ in range(100):
        middle = (low + high) / 2
        read = sum(min(cap, rate * middle) * size for rate, size in zip(rates, sizes, strict=True))
        low, high = (middle, high) if read < taken else (low, middle)
    return [min(cap, rate * high) for rate in rates]
