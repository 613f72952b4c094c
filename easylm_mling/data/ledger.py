"""The ledger, what a run has consumed by source and language, and news of sources that repeat or end."""

import numpy as np

from easylm_mling.data.catalog import Catalog
from easylm_mling.data.estimates import Estimates, catalog_rates
from easylm_mling.data.mixture import BAD, DOCUMENTS, EPOCH, PADDING, ROWS, TOKENS, DataState
from easylm_mling.data.weights import ONE, MixingPlan, language_tokens


class Ledger:
    """Reads the ledger from data states. Epochs are tokens consumed over the estimated tokens of the corpus."""

    def __init__(self, catalog: Catalog, plan: MixingPlan, estimates: Estimates, sequence_length: int):
        self._plan, self._length = plan, sequence_length
        rates = catalog_rates(estimates)
        self._sizes = {name: language_tokens(s, rates.get(name, {})) for name, s in catalog.sources.items()}
        self._languages = {name: s.languages for name, s in catalog.sources.items()}

    def sources(self, state: DataState) -> dict[str, dict]:
        """Return for each source: planned share so far, tokens, documents, rows, padding (tokens), bad records, epochs."""
        counts, lanes = state.lanes.sum(axis=0), len(state.lanes)
        rounds = int(counts[:, ROWS].sum()) // lanes
        planned = self._plan.target(rounds) if rounds else self._plan.shares_at(0)
        sources = {}
        for i, (name, sizes) in enumerate(self._sizes.items()):
            tokens, padding = int(counts[i, TOKENS]), int(counts[i, PADDING])
            sources[name] = {
                "wanted": round(planned[i] / ONE / max(1, rounds), 6),
                "tokens": tokens,
                "documents": int(counts[i, DOCUMENTS]),
                "rows": (tokens + padding) // self._length,
                "padding": padding,
                "bad": int(counts[i, BAD]),
                "epochs": _epochs(tokens, sum(sizes)),
            }
        return sources

    def languages(self, state: DataState) -> dict[str, dict[str, dict]]:
        """Return for each language of the sources with more than one: tokens, documents, bad records, epochs."""
        sources, at = {}, 0
        for name, languages in self._languages.items():
            counts = state.languages[at : at + len(languages)].tolist()
            at += len(languages)
            if len(languages) > 1:
                sources[name] = {
                    language: {"tokens": t, "documents": d, "bad": b, "epochs": _epochs(t, size)}
                    for language, (t, d, b), size in zip(languages, counts, self._sizes[name], strict=True)
                }
        return sources

    def whole(self, state: DataState) -> dict:
        """Return sources, languages and totals."""
        sources = self.sources(state)
        totals = {k: sum(s[k] for s in sources.values()) for k in ("tokens", "documents", "rows", "padding", "bad")}
        return {**totals, "sources": sources, "languages": self.languages(state)}

    def news(
        self, before: DataState | None, after: DataState, ends: list[int | None], lanes_with_data: list[int]
    ) -> list[str]:
        """Return a line for each source that, between two states, was read 1, 2, 4 ... times or used up in lanes.

        `ends`: for each source the epoch at which its streams end, or None (EpochOrder.epochs). `lanes_with_data`: see
        the Loader's attribute.
        """
        lines = []
        for i, (name, sizes) in enumerate(self._sizes.items()):
            now, then = (0 if s is None else int(s.lanes[:, i, TOKENS].sum()) for s in (after, before))
            times = int(now / size) if (size := sum(sizes)) else 0
            # Only at powers of two: a tiny source is read again in every step.
            power = 1 << times.bit_length() - 1 if times else 0
            if power and then < power * size:
                lines.append(f"{name} has been read about {'once' if power == 1 else f'{power} times'}")
            if ends[i] is None:
                continue
            own = lanes_with_data[i]
            used = [0 if s is None else int(np.sum(s.lanes[:own, i, EPOCH] >= ends[i])) for s in (after, before)]
            if used[0] > used[1] and (used[1] == 0 or used[0] == own):
                where = "all its lanes" if used[0] == own else f"{used[0]} of its {own} lanes"
                lines.append(f"{name} is used up in {where}: their rows of it go to the other sources")
        return lines


def _epochs(tokens: int, size: float) -> float | None:
    return round(tokens / size, 4) if size else None
