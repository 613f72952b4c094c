"""Going on differently: what `train --change KEY=VALUE` may change of a run that has begun, and RUN/history.jsonl, its record.

A line of the record is `{"kind": "change", "step": S, "time": ..., "key": KEY, "old": ..., "new": ...}`: after step S the run
went on with the new value. The schedule of the learning rate is a function of the step and of the config, so from there on
it is what it would be had the run begun with the new value. After a change of the batch size it is one of the tokens
(training/optimizer.py); see run/batch_size.py for the rest.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from easylm_mling.config import Change, RunConfig, leaves, to_tree
from easylm_mling.errors import ConfigError
from easylm_mling.monitoring.metrics import MetricsLog, read_lines

_BUDGET, BATCH_SIZE = "train.budget_tokens", "train.batch_size"


def check_changes(config: RunConfig, keys: Collection[str]):
    """Raise ConfigError for a key that no run may change, and where the budget decides the shares of the data."""
    settings = leaves(config)
    for key in keys:
        if key not in settings or not settings[key].setting.change:
            known = ", ".join(name for name, leaf in settings.items() if leaf.setting.change)
            raise ConfigError(f"--change {key}: is fixed for a run's life; --change takes {known}")
    by_budget = config.data.weighting.by == "unimax" or any(
        s.language_by == "unimax" for s in config.data.sources.values()
    )
    if by_budget and (key := next((k for k in (_BUDGET, BATCH_SIZE) if k in keys), "")):
        raise ConfigError(f"--change {key}: with unimax the budget decides the shares of the data; start a new run_dir")


def record_changes(history: Path, step: int, changes: Iterable[Change]):
    """Append the changes after `step` to the record; those that a killed process had written are not written again."""
    past = {(line["step"], line.get("key"), str(line.get("new"))) for line in past_changes(history)}
    with MetricsLog(history) as log:
        for change in changes:
            new = to_tree(change.new)
            if (step, change.key, str(new)) not in past:
                log.write("change", step, key=change.key, old=to_tree(change.old), new=new)


def past_changes(history: Path) -> list[dict]:
    """Return the lines of the record; none where there is no file."""
    return read_lines(history, "change") if history.is_file() else []


def change_text(line: dict) -> str:
    """Return a line of the record in words."""
    return f"after step {line['step']:,} {line.get('key')} was changed from {line.get('old')} to {line.get('new')}"
