"""`data inspect --show`: the first documents of every source as a model is given them, with the trained tokens marked.

Beside them stands what a sample of each source of conversations says of its rows: refused, cut, trained share.
"""

import html
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from easylm_mling.config import MixerConfig
from easylm_mling.data.catalog import Catalog, Source, build_catalog
from easylm_mling.data.conversations.encoding import UNTRAINED
from easylm_mling.data.conversations.messages import notes_of
from easylm_mling.data.documents import conversation_encoder, encode_documents
from easylm_mling.data.packing import whole_rows
from easylm_mling.data.shuffle import EpochOrder, Window, epoch_windows
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.storage.atomic import write_atomically

# Conversations that a sample holds at most.
_SAMPLED = 500
# Without colours the trained tokens stand between these.
_MARKS = ("⟦", "⟧")
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #333; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; border-radius: 4px; padding: .8em; color: #666; }
mark { background: #c9f0d0; color: #06361a; } .control { color: #2456a8; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } pre { border-color: #555; color: #aaa; }
mark { background: #1d5a34; color: #eafff0; } .control { color: #8ab4f8; } }"""


class Run(NamedTuple):
    """Tokens that follow one another and are all targets, or none is; a control token is a run of its own."""

    text: str
    is_target: bool
    is_control: bool


class Shown(NamedTuple):
    """A document of a source: its runs, tokens, and how many of those are targets."""

    source: str
    runs: list[Run]
    tokens: int
    targets: int


def shown_documents(config: MixerConfig, count: int) -> Iterator[Shown]:
    """Yield the first `count` documents of each source, in the order of its first epoch; raises ConfigError for bad files."""
    catalog, tokenizer = build_catalog(config.data), Tokenizer(config.data.tokenizer)
    for source in catalog.sources.values():
        documents = (text for window in _windows(catalog, source) for text in window.documents)
        made = (encode_documents(source, tokenizer, [text]).tokens for text in documents)
        for tokens in islice((t for t in made if len(t)), count):
            # BOS is no target of a text either.
            targets = int(np.count_nonzero(tokens[1:] < UNTRAINED))
            yield Shown(source.name, _runs(tokens, tokenizer), len(tokens), targets)


def sample_conversations(catalog: Catalog, source: Source, tokenizer: Tokenizer) -> dict:
    """Return what a sample of the source's conversations says of it, as plain data.

    `read` conversations and rows; `refused`: reason -> how many; `notes`: what was left out of rows -> how many; `cut` at
    the end of a row; `writes_control`: with the name of a control token in a message; `joint_differs`: whose ids would
    differ if prompt and answer were tokenised together; `targets`, share of the tokens; `full`, share of the rows that
    they are packed into, or None if one row holds all.
    """
    encoder, refused, notes = conversation_encoder(source, tokenizer), Counter(), Counter()
    good = cut = control = differs = targets = 0
    lengths = []
    for window in islice(_windows(catalog, source), 20):
        refused.update(record.reason for record in window.bad)
        for text in window.documents[: _SAMPLED - good]:
            try:
                ids = encoder.encode(text)
            except ValueError as error:
                refused[str(error)] += 1
                continue
            good += 1
            notes.update(notes_of(text))
            cut += encoder.is_cut(text)
            control += encoder.writes_control(text)
            differs += not encoder.joint(text)
            lengths.append(len(ids))
            targets += int(np.count_nonzero(ids < UNTRAINED))
        if good >= _SAMPLED:
            break
    return {
        "read": good + sum(refused.values()),
        "refused": dict(refused.most_common()),
        "notes": dict(notes),
        "cut": cut,
        "writes_control": control,
        "joint_differs": differs,
        "targets": round(targets / max(1, sum(lengths)), 4),
        "full": _fullness(lengths, source.settings["conversations"]["length"]),
    }


def _fullness(lengths: list[int], length: int) -> float | None:
    """Return how full packed rows are without the last one, which more conversations would fill."""
    _, real = whole_rows(np.cumsum(lengths, dtype=np.int64), len(lengths), length)
    return round(float(np.mean(real[:-1])) / length, 4) if len(real) > 1 else None


def conversation_lines(name: str, sample: dict) -> list[str]:
    """Return what to print of `sample_conversations`, a line for each thing that is worth one."""
    read = max(1, sample["read"])
    lines = [f"{name}: {sample['targets']:.1%} of the tokens are targets, in a sample of {sample['read']} rows"]
    if sample["full"] is not None:
        lines.append(f"{name}: packed rows are {sample['full']:.1%} full")
    lines += [f"{name}: {count / read:.1%} of the rows are refused: {why}" for why, count in sample["refused"].items()]
    lines += [f"{name}: {count / read:.1%} of the rows lose {what}" for what, count in sample["notes"].items()]
    told = {
        "cut": "are longer than a row and cut",
        "writes_control": "write the name of a control token: it stays text",
        "joint_differs": "would have other ids if prompt and answer were tokenised together, as some servers do; a "
        "template whose prompt ends in a newline avoids it",
    }
    return lines + [f"{name}: {sample[key] / read:.1%} of the rows {text}" for key, text in told.items() if sample[key]]


def print_documents(shown: Iterator[Shown], console: Console):
    """Print documents: in a terminal the trained tokens in colour, else between marks."""
    for number, document in enumerate(shown, 1):
        console.rule(_title(number, document), align="left", characters="-")
        text = Text(no_wrap=False, overflow="fold")
        for run in document.runs:
            marked = run.is_target and not console.is_terminal
            style = ("bold green" if run.is_target else "dim") if not run.is_control else "cyan"
            if run.is_target and run.is_control:
                style = "bold cyan underline"
            text.append(run.text.join(_MARKS) if marked else run.text, style)
        console.print(text, highlight=False, soft_wrap=True)


def write_html(shown: Iterator[Shown], path: str | Path):
    """Write documents as a page with the trained tokens marked, atomically."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Trained tokens</title>", f"<style>{_STYLE}</style>"]
    parts.append("<h1>Trained tokens</h1><p>What is <mark>marked</mark> is a target of the loss.</p>")
    for number, document in enumerate(shown, 1):
        parts.append(f"<h2>{html.escape(_title(number, document))}</h2><pre>")
        for run in document.runs:
            text = html.escape(run.text)
            text = f"<span class='control'>{text}</span>" if run.is_control else text
            parts.append(f"<mark>{text}</mark>" if run.is_target else text)
        parts.append("</pre>")
    write_atomically(path, "".join(parts).encode())


def _title(number: int, document: Shown) -> str:
    return f"{number}. {document.source}: {document.tokens} tokens, {document.targets} of them targets "


def _windows(catalog: Catalog, source: Source) -> Iterator[Window]:
    order = EpochOrder(source, catalog.settings["seed"], catalog.settings["block_bytes"])
    return epoch_windows(order, 0, "train")


def _runs(tokens: np.ndarray, tokenizer: Tokenizer) -> list[Run]:
    """Return a document's tokens as runs, with the names of control tokens."""
    controls = tokenizer.control_ids  # looked up in the vocabulary each time
    runs, waiting, before = [], [], False
    for i, token in enumerate([*tokens.tolist(), None]):
        is_target = token is not None and i > 0 and token < UNTRAINED
        plain = None if token is None else token & ~UNTRAINED
        is_control = plain in controls
        if waiting and (plain is None or is_control or is_target != before):
            runs.append(Run(tokenizer.decode(waiting), before, False))
            waiting = []
        if plain is not None and is_control:
            runs.append(Run(tokenizer.piece(plain), is_target, True))
        elif plain is not None:
            waiting.append(plain)
        before = is_target
    return runs
