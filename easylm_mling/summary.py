"""The closing table of a run: what was consumed of each source, beside what was asked for, and what it did to the loss."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from easylm_mling.checkpoint import load_data_state
from easylm_mling.config import ConfigError, RunConfig, load
from easylm_mling.data.mixture import COUNTERS
from easylm_mling.metrics import read_metrics


def print_summary(run_dir: str, console: Console | None = None):
    """Print the table of the run in `run_dir` as of its newest checkpoint, and where it was exported to."""
    config_file, metrics_file = Path(run_dir) / "config.yaml", Path(run_dir) / "metrics.jsonl"
    if not config_file.is_file():
        raise ConfigError(f"{run_dir}: not a run's directory (no config.yaml)")
    console = console or Console()
    console.print(summary_table(load([str(config_file)]), metrics_file, load_data_state(run_dir)))
    for export in read_metrics(metrics_file, "export"):
        console.print(
            f"step {export['step']} exported in {export['dtype']} to {export['path']}", highlight=False, soft_wrap=True
        )


def summary_table(config: RunConfig, metrics_file: Path, data_state: np.ndarray) -> Table:
    """A row a source: share wanted, share, tokens, documents, bad records, held-out loss (nats a token) first and last.

    data_state is int64 [lanes, sources, counters] as saved with a checkpoint.
    """
    evaluations = read_metrics(metrics_file, "eval")
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    consumed = data_state.sum(axis=0)
    tokens, documents, bad = (consumed[:, COUNTERS.index(c)] for c in ("tokens", "documents", "bad"))
    weights = [s.weight for s in config.data.sources.values()]

    def losses(name=None):
        found = [e.get("sources", {}).get(name) if name else e.get("loss") for e in (first, last)]
        return ["-" if x is None else f"{x:.3f}" for x in found]

    table = Table(
        title=f"{config.run_dir}: tokens of each source, and its held-out loss (nats a token)", title_justify="left"
    )
    table.add_column("source", no_wrap=True)
    for heading in ("wanted", "share", "tokens", "documents", "bad", "loss", "at end"):
        table.add_column(heading, justify="right")
    total = int(tokens.sum())
    for s, name in enumerate(config.data.sources):
        share = tokens[s] / max(1, total)
        counts = (f"{n:,}" for n in (tokens[s], documents[s], bad[s]))
        table.add_row(name, f"{weights[s] / sum(weights):.2%}", f"{share:.2%}", *counts, *losses(name))
    table.add_section()
    table.add_row("all", "", "", *(f"{n:,}" for n in (total, documents.sum(), bad.sum())), *losses())
    table.caption = (
        f"budget {config.train.budget_tokens:,} tokens; consumed {total:,} in {total // config.tokens_per_step:,} steps "
        f"of {config.tokens_per_step:,}"
    )
    return table
