"""The closing table of a run: tokens consumed of each source beside the shares asked for, and the held-out losses."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easylm_mling.checkpoint.reading import load_data_state, load_info
from easylm_mling.config import RunConfig, from_tree
from easylm_mling.data.mixture import DataState
from easylm_mling.monitoring.console import make_console, say
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.run.data import load_ledger
from easylm_mling.storage.object_store import run_files


def print_summary(run_dir: str, console: Console | None = None):
    """Print the table of the run in `run_dir` as of its newest checkpoint, and where it was exported to."""
    files = run_files(run_dir)
    metrics_file = files / "metrics.jsonl"
    console = console or make_console()
    config = from_tree(RunConfig, load_info(run_dir)["config"])
    state = DataState(**load_data_state(run_dir))
    console.print(summary_table(config, metrics_file, load_ledger(config, files).sources(state)))
    for export in read_metrics(metrics_file, "export"):
        say(console, f"step {export['step']} exported in {export['dtype']} to {export['path']}")


def summary_table(config: RunConfig, metrics_file: Path, consumed: dict[str, dict]) -> Table:
    """A row a source: share wanted, share, tokens, documents, epochs, bad records, held-out loss first and last.

    `consumed` is Ledger.sources' at the step in question; losses are nats a token, epochs estimates.
    """
    evaluations = read_metrics(metrics_file, "eval")
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})

    def losses(name=None):
        values = [e.get("sources", {}).get(name) if name else e.get("loss") for e in (first, last)]
        return ["-" if x is None else f"{x:.3f}" for x in values]

    table = Table(
        title=f"{escape(config.run_dir)}: tokens of each source, and its held-out loss (nats a token)",
        title_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("source", no_wrap=True)
    for heading in ("wanted", "share", "tokens", "documents", "epochs", "bad", "loss", "at end"):
        table.add_column(heading, justify="right", no_wrap=True)
    tokens, documents, bad, rows = (
        sum(s[k] for s in consumed.values()) for k in ("tokens", "documents", "bad", "rows")
    )
    for name, source in consumed.items():
        shares = (f"{source['wanted']:.2%}", f"{source['tokens'] / max(1, tokens):.2%}")
        counts = (f"{source['tokens']:,}", f"{source['documents']:,}")
        epochs = "-" if source["epochs"] is None else f"{source['epochs']:.2f}"
        table.add_row(name, *shares, *counts, epochs, f"{source['bad']:,}", *losses(name))
    table.add_section()
    table.add_row("all", "", "", f"{tokens:,}", f"{documents:,}", "", f"{bad:,}", *losses())
    table.caption = (
        f"budget {config.train.budget_tokens:,} tokens; consumed {tokens:,} in {rows // config.train.batch_size:,} steps "
        f"of {config.tokens_per_step:,}"
    )
    return table
