"""Open the models of a recipe: everything about them is compared before a weight is read."""

from dataclasses import dataclass
from pathlib import Path

from easylm_mling.config import ModelConfig
from easylm_mling.merge.compatibility import merged_model
from easylm_mling.merge.recipe import MergeRecipe, resolve_average
from easylm_mling.merge.sources import Source, open_source
from easylm_mling.merge.stream import Merging


@dataclass(frozen=True)
class Opened:
    """A recipe whose models have been opened and compared; no weight of them has been read."""

    recipe: MergeRecipe
    merging: Merging
    model: ModelConfig
    tokenizer: Path  # the folder of the tokenizer's files that the merged model gets
    notes: list[str]

    @property
    def sources(self) -> list[Source]:
        """The models, first the one that gives the config."""
        return list(self.merging.sources.values())


def open_merge(recipe: MergeRecipe) -> Opened:
    """Open and compare the models of a recipe. Raises ConfigError for what cannot be merged."""
    recipe = resolve_average(recipe)
    sources = {ref.key: open_source(ref) for ref in recipe.sources}
    model, teller, notes = merged_model(recipe, list(sources.values()))
    return Opened(recipe, Merging(recipe, sources, model), model, teller.tokenizer, notes)
