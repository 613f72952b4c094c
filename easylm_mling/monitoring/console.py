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
    """A console as wide as the terminal; in a file or a pipe, as wide as the widest table."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(width=110, quiet=quiet)


def say(console: Console, text: str):
    """Print one line of news. Nothing in it is taken for markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, text: str):
    """Print one line that stands out, also where there are no colours."""
    console.print(f"warning: {text}", style="bold yellow", markup=False, highlight=False, soft_wrap=True)


class ProgressLine:
    """A line that follows the run: a bar on a terminal, elsewhere a line every few seconds. A context manager."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, console: Console, total_steps: int, tokens_per_step: int):
        self._console, self._total, self._per_step = console, total_steps, tokens_per_step
        # The first step that ended, and when. The step itself waited for compilation and says nothing of the speed.
        self._first: tuple[int, float] | None = None
        self._next_line = 0.0
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task("train", total=total_steps, text="compiling")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def begin(self, step: int):
        """Show the bar at `step`, on a terminal."""
        self._bar.update(self._task, completed=step)
        if self._console.is_terminal:
            self._bar.start()

    def close(self):
        """Leave the bar as it is; later lines stand below it."""
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, step: int, loss: float | None, mfu: float | None = None) -> float | None:
        """Show that `step` is done. Returns the seconds to the budget at the mean speed of this process."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        first, since = self._first
        rate = (step - first) * self._per_step / (now - since) if step > first else None
        left = (self._total - step) * self._per_step / rate if rate else None
        text = f"loss {'not finite' if loss is None else f'{loss:.4f}'}  {tokens_text(rate)} tokens/s"
        text += ("" if mfu is None else f"  MFU {mfu:.1%}") + f"  {duration_text(left)} left"
        self._bar.update(self._task, completed=step, text=text)
        if not self._console.is_terminal and (now > self._next_line or step == self._total):
            self._next_line = now + self.SECONDS_BETWEEN_LINES
            self._console.print(f"step {step}/{self._total}  {text}", highlight=False)
        return left


def sources_table(step: int, train: dict, held_out: dict | None) -> Table:
    """A row for each source at `step`, from a train and an eval line of metrics.jsonl; the largest ones if there are many.

    It has the source's share, tokens, epochs, and its loss in the last batch and on held-out text.
    """
    ledger, held_out_losses = train["ledger"], (held_out or {}).get("sources", {})
    total = max(1, sum(source["tokens"] for source in ledger.values()))
    largest = sorted(ledger, key=lambda name: -ledger[name]["tokens"])[:_TABLE_ROWS]
    headings = ("wanted", "share", "tokens", "epochs", "in training", "held out")
    table = source_rows_table(f"step {step}: sources, and their loss (nats a token)", headings)
    table.title_style = "bold"
    for name, source in ledger.items():
        if name in largest:
            shares = (f"{source['wanted']:.2%}", f"{source['tokens'] / total:.2%}")
            losses = (loss_text(train["sources"].get(name)), loss_text(held_out_losses.get(name)))
            table.add_row(escape(name), *shares, tokens_text(source["tokens"]), epochs_text(source["epochs"]), *losses)
    if len(ledger) > _TABLE_ROWS:
        table.add_row(f"and {len(ledger) - _TABLE_ROWS} more", *[""] * len(headings))
    return table


def source_rows_table(title: str, headings: tuple[str, ...], first: str = "source") -> Table:
    """An empty table with a column of sources, or of what `first` says, and one of numbers for each of `headings`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def loss_text(loss: float | None) -> str:
    """A loss in nats a token, or a dash where there is none."""
    return "-" if loss is None else f"{loss:.3f}"


def epochs_text(epochs: float | None) -> str:
    """Epochs of a source, or a dash where its size is not known."""
    return "-" if epochs is None else f"{epochs:.2f}"
