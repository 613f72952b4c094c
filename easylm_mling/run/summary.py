"""The closing table of a run: what was consumed of each source beside the plan, and its held-out loss."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easylm_mling.checkpoint.reading import load_data_state, load_info
from easylm_mling.config import RunConfig, from_tree
from easylm_mling.data.mixture import DataState
from easylm_mling.monitoring.console import epochs_text, loss_text, make_console, say, source_rows_table
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.monitoring.task_table import before_and_after
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
    heads, rows = before_and_after(metrics_file)
    if rows:
        title = f"scores on {escape(config.eval.suite)} while it trained: before and after"
        tasks = source_rows_table(title, tuple(head.replace(", ", "\n") for head in heads[1:]), heads[0])
        for row in rows:
            tasks.add_row(*row)
        console.print(tasks)
    for export in read_metrics(metrics_file, "export"):
        steps = export.get("averaged", [])
        what = f"the mean of steps {', '.join(map(str, steps))}" if steps else f"step {export['step']}"
        what += " (averaged parameters)" if export.get("ema") else ""
        say(console, f"{what} exported in {export['dtype']} to {export['path']}")


def summary_table(config: RunConfig, metrics_file: Path, consumed: dict[str, dict]) -> Table:
    """A row for each source: its shares, tokens, documents, epochs, bad records, and its held-out loss first and last.

    `consumed` is Ledger.sources' at the step in question. Losses are nats a token; epochs are estimates.
    """
    evaluations = read_metrics(metrics_file, "eval")
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    total = {key: sum(source[key] for source in consumed.values()) for key in ("tokens", "documents", "bad", "rows")}
    table = source_rows_table(
        f"{escape(config.run_dir)}: tokens of each source, and its held-out loss (nats a token)",
        ("wanted", "share", "tokens", "documents", "epochs", "bad", "loss", "at end"),
    )
    for name, source in consumed.items():
        shares = (f"{source['wanted']:.2%}", f"{source['tokens'] / max(1, total['tokens']):.2%}")
        losses = [loss_text(line.get("sources", {}).get(name)) for line in (first, last)]
        table.add_row(name, *shares, *_counts(source, epochs_text(source["epochs"])), *losses)
    table.add_section()
    table.add_row("all", "", "", *_counts(total, ""), *(loss_text(line.get("loss")) for line in (first, last)))
    if config.train.ema:
        averages = (loss_text(line.get("ema", {}).get("loss")) for line in (first, last))
        table.add_row("all, averaged parameters", *[""] * 6, *averages)
    sizes = " and ".join(f"{size:,}" for _, _, size in config.step_tokens.pieces())
    table.caption = (
        f"budget {config.budget_tokens:,} tokens; consumed {total['tokens']:,} in "
        f"{config.step_tokens.step_of(total['rows'] * config.data.sequence_length):,} steps of {sizes}"
    )
    if first.get("stop_rate") is not None and last.get("stop_rate") is not None:
        table.caption += f"; stop rate of held-out answers {first['stop_rate']:.1%}, at end {last['stop_rate']:.1%}"
    return table


def _counts(source: dict, epochs: str) -> tuple[str, ...]:
    return f"{source['tokens']:,}", f"{source['documents']:,}", epochs, f"{source['bad']:,}"
