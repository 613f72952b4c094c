"""What a person sees while a run trains: a line of progress, a table now and then, warnings that stand out."""

import time

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from easylm_mling.formatting import duration_text, tokens_text

_TABLE_ROWS = 12


def make_console(quiet: bool = False) -> Console:
    """A terminal's own width; in a file or a pipe, room for the widest table."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(width=110, quiet=quiet)


def say(console: Console, text: str):
    """One line of news as it is: nothing in it is taken for markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, text: str):
    """A line that stands out, also where there are no colours."""
    console.print(f"warning: {text}", style="bold yellow", markup=False, highlight=False, soft_wrap=True)


class ProgressLine:
    """One line that follows the run: a bar on a terminal, a printed line every few seconds elsewhere."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, console: Console, total_steps: int, tokens_per_step: int, start_step: int):
        self.console, self.total, self.per_step = console, total_steps, tokens_per_step
        # Speed is measured from the second step of this process: the first one holds the compilation.
        self.first = start_step + 1
        self.since = self.printed = None
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=start_step, text="compiling")

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Leave the line as it is; what is printed from now on stands below it."""
        self.bar.stop()

    def update(self, step: int, loss: float | None, mfu: float | None = None) -> float | None:
        """Show that `step` is done; returns the seconds to the budget at the speed of this process so far."""
        now = time.monotonic()
        if self.since is None:
            self.since = now
        rate = (step - self.first) * self.per_step / (now - self.since) if step > self.first else None
        left = (self.total - step) * self.per_step / rate if rate else None
        text = f"loss {'not finite' if loss is None else f'{loss:.4f}'}  {tokens_text(rate)} tokens/s"
        text += ("" if mfu is None else f"  MFU {mfu:.1%}") + f"  {duration_text(left)} left"
        self.bar.update(self.task, completed=step, text=text)
        due = self.printed is None or now - self.printed > self.SECONDS_BETWEEN_LINES or step == self.total
        if not self.console.is_terminal and due:
            self.printed = now
            self.console.print(f"step {step}/{self.total}  {text}", highlight=False)
        return left


def sources_table(step: int, train: dict, held_out: dict | None) -> Table:
    """A row a source at `step`: its share, its tokens, its loss in the last batch and on held-out text, as in lines of
    metrics.jsonl. The largest ones if there are many."""
    title = f"step {step}: sources, and their loss (nats a token)"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    table.add_column("source", no_wrap=True)
    for heading in ("wanted", "share", "tokens", "epochs", "in training", "held out"):
        table.add_column(heading, justify="right", no_wrap=True)
    ledger, total = train["ledger"], max(1, sum(s["tokens"] for s in train["ledger"].values()))
    order = sorted(ledger, key=lambda name: -ledger[name]["tokens"])
    shown = lambda x: "-" if x is None else f"{x:.3f}"  # noqa: E731
    for name in [n for n in ledger if n in order[:_TABLE_ROWS]]:
        s = ledger[name]
        losses = (shown(train["sources"].get(name)), shown((held_out or {}).get("sources", {}).get(name)))
        epochs = "-" if s["epochs"] is None else f"{s['epochs']:.2f}"
        shares = (f"{s['wanted']:.2%}", f"{s['tokens'] / total:.2%}")
        table.add_row(escape(name), *shares, tokens_text(s["tokens"]), epochs, *losses)
    if len(ledger) > _TABLE_ROWS:
        table.add_row(f"and {len(ledger) - _TABLE_ROWS} more", *[""] * 6)
    return table
