"""A run's data state after a deliberate change of its sources, files or tokenizer: `train --accept-data-change`.

A source whose files, cuts and settings are as before goes on at its cursor. With a new tokenizer it goes on at the start
of the current document, which is then read again. Every other source begins at its first epoch, so its documents may be
read again. Counts are kept, except for a source that is gone. Shares hold from here on: no source is behind.
"""

import numpy as np

from easylm_mling.data.catalog import Catalog, Source
from easylm_mling.data.documents import has_conversations
from easylm_mling.data.mixture import EXTRA, OFFSET, ROWS, DataState, initial_state
from easylm_mling.data.pool import is_pooled
from easylm_mling.data.shuffle import shares_units
from easylm_mling.data.weights import MixingPlan, planned_as_if

# The counters before are the cursor.
_CURSOR = ROWS


def carry_over(
    state: DataState, old: Catalog, new: Catalog, plan: MixingPlan, same_tokenizer: bool
) -> tuple[DataState, list[str]]:
    """Return the whole run's state for the sources of `new`, and a line about each source that does not just go on."""
    lanes, rounds = len(state.lanes), int(state.lanes[0, :, ROWS].sum())
    before = list(old.sources)
    fresh = initial_state(lanes, len(new.sources), range(lanes), sum(len(s.languages) for s in new.sources.values()))
    news = [f"{name} is gone; its counts leave the ledger" for name in before if name not in new.sources]
    for i, (name, source) in enumerate(new.sources.items()):
        if name not in old.sources:
            news.append(f"{name} is new")
            continue
        counters, earlier = fresh.lanes[:, i], state.lanes[:, before.index(name)]
        counters[:, _CURSOR:] = earlier[:, _CURSOR:]
        if _same_order(old.sources[name], source, same_tokenizer, lanes):
            counters[:, :_CURSOR] = earlier[:, :_CURSOR]
            counters[:, OFFSET] *= same_tokenizer
        else:
            news.append(f"{name} has changed and begins at its first epoch")
    fresh.lanes[..., ROWS] = planned_as_if(plan, lanes, rounds)
    fresh.lanes[..., EXTRA] = 0
    counted = dict(zip(_languages(old), state.languages, strict=True))
    for i, key in enumerate(_languages(new)):
        fresh.languages[i] = counted.get(key, 0)
    return fresh, news


def _same_order(old: Source, new: Source, same_tokenizer: bool, lanes: int) -> bool:
    """Return True if a cursor means the same document in both."""
    # Rates by tokens depend on the tokenizer; those of UniMax on the weights, too.
    same_rates = {"bytes": True, "tokens": same_tokenizer, "unimax": False}[new.settings["language_by"]]
    same_dealing = old.dealing == new.dealing or is_pooled(new) or not shares_units(new, lanes)
    return (
        same_dealing
        and (same_rates or len(new.languages) == 1)
        and old.files == new.files
        and old.settings == new.settings
        and np.array_equal(old.units, new.units)
        # Another tokenizer may refuse other conversations.
        and (same_tokenizer or not has_conversations(new))
    )


def _languages(catalog: Catalog) -> list[tuple[str, str]]:
    return [(name, language) for name, source in catalog.sources.items() for language in source.languages]
