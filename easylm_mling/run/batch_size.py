"""The batch sizes that a run has had: what `--change train.batch_size` needs to know of the past.

The truth lies in the checkpoint that the run goes on from: its config has the size of the steps before it, and the sizes
before that one. So a rewind behind a change, or a checkpoint that is lost, takes the change back, too.

The lanes, which hold the order of the data, stay those that the run began with. A batch has more or fewer rows of each.
"""

from dataclasses import replace

from easylm_mling.checkpoint.layout import newest_step
from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config import EarlierBatchSize, RunConfig, from_tree
from easylm_mling.errors import ConfigError, check


def with_past(config: RunConfig, kept: RunConfig) -> RunConfig:
    """Return the config with the sizes and lanes of the run's past; `kept` is the config in its directory.

    Raises ConfigError for a size that is no multiple of the lanes.
    """
    counted = kept.train.counted_tokens if kept.train.budget_epochs == config.train.budget_epochs else 0
    config = replace(config, train=replace(config.train, counted_tokens=counted))
    step = newest_step(config.run_dir)
    if not step or (kept.train.batch_size == config.train.batch_size and not kept.train.earlier_batch_sizes):
        return replace(config, train=replace(config.train, earlier_batch_sizes=()))
    try:
        past = from_tree(RunConfig, load_info(config.run_dir, step)["config"])
    except ConfigError:
        past = kept  # a restore sets the checkpoint aside, and `after` says what holds then
    lanes = config.data.lanes or kept.data.lanes or past.lanes
    batch_size = config.train.batch_size
    check(
        batch_size % lanes == 0,
        f"train.batch_size={batch_size}: this run's rows are dealt to {lanes} lanes for good, as many as data.lanes says or "
        f"its first batch had rows; use a multiple of {lanes} (data.lanes can be set lower only when a run begins)",
    )
    return after(replace(config, data=replace(config.data, lanes=lanes)), past, step)


def after(config: RunConfig, past: RunConfig, step: int) -> RunConfig:
    """Return the config as it goes on from the checkpoint of `step`, which was saved by the config `past`."""
    sizes = past.train.earlier_batch_sizes
    if step and past.train.batch_size != config.train.batch_size:
        sizes = (*sizes, EarlierBatchSize(step, past.train.batch_size))
    return replace(config, train=replace(config.train, earlier_batch_sizes=sizes))
