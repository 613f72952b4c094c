"""The budget of a run by epochs: its data is mixed and packed once before the run begins, and its steps are counted."""

from dataclasses import replace

from easylm_mling.config import MixerConfig, RunConfig
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.estimates import catalog_rates, estimate
from easylm_mling.data.loader import Loader
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.weights import language_tokens, make_plan
from easylm_mling.errors import ConfigError, check
from easylm_mling.formatting import tokens_text
from easylm_mling.run.directory import RunDirectory

# A core tokenises and packs so much in under an hour.
_MOST_TOKENS = 4_000_000_000


def with_counted_epochs(
    config: RunConfig, run: RunDirectory, catalog: Catalog, tokenizer: Tokenizer, accept_data_change: bool
) -> RunConfig:
    """Return the config with the tokens of `train.budget_epochs`: counted when the run begins, and kept by it.

    Raises ConfigError for data that is too large to be counted, and for a run that goes on with other data.
    """
    if not config.train.budget_epochs:
        return config
    check(
        not accept_data_change,
        "--accept-data-change: train.budget_epochs was counted for the data that this run began with; start a new run_dir, with "
        "init_from to start from this run's parameters",
    )
    if config.train.counted_tokens and not run.begins_anew:
        return config
    steps = count_steps(config.mixer, catalog, tokenizer)
    return replace(config, train=replace(config.train, counted_tokens=steps * config.tokens_per_step))


def count_steps(config: MixerConfig, catalog: Catalog, tokenizer: Tokenizer) -> int:
    """Return the batches that hold every document `config.budget_epochs` times; the last of them may be padded.

    A pure function of files, tokenizer and config. Reads and tokenises every epoch, and keeps none of it.
    """

    rates = catalog_rates(estimate(catalog, tokenizer))
    size = sum(sum(language_tokens(source, rates[name])) for name, source in catalog.sources.items())
    whole = size * config.budget_epochs
    if whole > _MOST_TOKENS:
        raise ConfigError(
            f"train.budget_epochs={config.budget_epochs}: about {tokens_text(round(whole))} tokens, which would take hours to "
            f"count; give train.budget_tokens={round(whole)} instead"
        )
    steps, plan = 0, make_plan(config, catalog, rates)
    with Loader(config, catalog, tokenizer, plan=plan) as loader:
        for number, (batch, _) in enumerate(loader, 1):
            if batch["segment_ids"].any():
                steps = number
    check(steps > 0, f"train.budget_epochs={config.budget_epochs}: no document to train on; name other paths")
    return steps
