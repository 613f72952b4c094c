"""`easylm-mling data inspect`: what a run will read, and how often, before it begins. Uses no device."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from easylm_mling.charts import Line, draw_lines, draw_png
from easylm_mling.config import MixerConfig
from easylm_mling.data.catalog import Source, build_catalog
from easylm_mling.data.documents import has_conversations
from easylm_mling.data.estimates import catalog_rates, estimate
from easylm_mling.data.pool import is_pooled
from easylm_mling.data.shuffle import shares_units
from easylm_mling.data.sources.listing import left_out_text
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.tools.forecast import forecast
from easylm_mling.data.tools.show import conversation_lines, sample_conversations
from easylm_mling.data.weights import language_text, language_tokens, make_plan
from easylm_mling.formatting import tokens_text

# Languages printed of a source: so many of the most, and of the least repeated ones.
_SHOWN = 8


def inspect_data(config: MixerConfig) -> dict:
    """Return everything the tables show, as plain data. Reads about a unit of each language (see data/estimates.py).

    `bytes` (of text) and `tokens` are the size of all documents once, and `taken` is what the run takes of them; all are
    estimates. A budget that is not known is all data once. Raises ConfigError as
    build_catalog does.
    """
    catalog, tokenizer = build_catalog(config.data), Tokenizer(config.data.tokenizer)
    tokenizer.count_controls()
    estimates = estimate(catalog, tokenizer)
    rates = catalog_rates(estimates)
    sizes = {name: language_tokens(source, rates[name]) for name, source in catalog.sources.items()}
    if not config.budget_tokens:
        used = [size for name, size in sizes.items() if config.data.sources[name].weight != 0]
        config = replace(config, budget_tokens=max(1, round(sum(map(sum, used)) * max(1, config.budget_epochs))))
    plan = make_plan(config, catalog, rates)
    expected = forecast(config, catalog, plan, sizes)
    sources = {}
    for name, source in catalog.sources.items():
        e = expected.sources[name]
        columns = (
            source.languages,
            language_text(source, rates[name]),
            sizes[name],
            e.language_epochs,
            estimates[name].values(),
        )
        languages = {
            language: {
                "bytes": round(size),
                "tokens": round(tokens),
                "tokens_per_byte": round(f.tokens_per_text, 4),
                "taken": round(tokens * epochs),
                "epochs": round(epochs, 4),
            }
            for language, size, tokens, epochs, f in zip(*columns, strict=True)
        }
        sources[name] = {
            "files": len(source.files),
            "layouts": dict(Counter(f.layout for f in source.files)),
            "left_out": list(source.left_out),
            "file_bytes": sum(f.size for f in source.files),
            "bytes": sum(x["bytes"] for x in languages.values()),
            "tokens": round(e.size),
            "taken": round(e.taken),
            "share": round(e.taken / max(1.0, expected.tokens), 6),
            "epochs": round(e.epochs, 4),
            "note": _note(e, config.data.sources[name].when_used_up, config.budget_epochs)
            + _shared(source, config.lanes),
            "languages": languages,
        }
        if has_conversations(source):
            sources[name]["conversations"] = sample_conversations(catalog, source, tokenizer)
    budget = round(expected.tokens) if config.budget_epochs else config.total_steps * config.tokens_per_step
    return {
        "budget": budget,
        "tokens": round(expected.tokens),
        "padding": round(expected.padding),
        "texts_with_controls": tokenizer.texts_with_controls,
        "sources": sources,
    }


def print_inspection(inspection: dict, console: Console):
    """Print the tables: sources, then the languages of each source with more than one."""
    console.print(_source_table(inspection))
    for name, source in inspection["sources"].items():
        console.print(f"  {name}: {source['note']}", highlight=False, soft_wrap=True)
        for line in conversation_lines(name, source["conversations"]) if "conversations" in source else ():
            console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
        if len(source["layouts"]) > 1:
            kinds = ", ".join(f"{count} {layout}" for layout, count in sorted(source["layouts"].items()))
            console.print(f"  {name}: its files are {kinds}", highlight=False, soft_wrap=True)
        if source["left_out"]:
            console.print(
                f"  {name}: {left_out_text(source['left_out'])}", highlight=False, soft_wrap=True, markup=False
            )
    if inspection["tokens"] < inspection["budget"]:
        console.print(
            f"  the data ends after {tokens_text(inspection['tokens'])} tokens, before the budget", highlight=False
        )
    packed = any("conversations" in source for source in inspection["sources"].values())
    besides = ", besides what whole conversations leave of their rows" if packed else ""
    console.print(
        f"  padding: at most {inspection['padding'] / max(1, inspection['tokens']):.3%} of the tokens{besides}",
        highlight=False,
    )
    if count := inspection["texts_with_controls"]:
        console.print(
            f"  {count} documents of the sample write the name of a control token, such as <eos>: it stays text",
            highlight=False,
        )
    for name, source in inspection["sources"].items():
        if len(source["languages"]) > 1:
            console.print(_language_table(name, source["languages"]))
    console.print("Tokens, epochs and padding are estimates from a sample of each language.", style="dim")


def plot_inspection(inspection: dict, path: str | Path):
    """Draw a PNG: the size of every source and language beside what the run takes of it."""
    many = {n: s["languages"] for n, s in inspection["sources"].items() if len(s["languages"]) > 1}
    heights = [max(2.0, 0.45 * len(inspection["sources"])), *[4.0] * len(many)]
    with draw_png(path, 10, sum(heights) + 1) as figure:
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _plot_sources(axes[0], inspection)
        for axis, (name, languages) in zip(axes[1:], many.items(), strict=True):
            _plot_languages(axis, name, languages)


def _plot_sources(axis, inspection: dict):
    names, sources = list(inspection["sources"])[::-1], list(inspection["sources"].values())[::-1]
    size, taken = sum(s["tokens"] for s in sources), sum(s["taken"] for s in sources)
    for shift, key, total, label in ((0.2, "tokens", size, "in the corpora"), (-0.2, "taken", taken, "in the run")):
        shares = [100 * s[key] / max(1, total) for s in sources]
        axis.barh([i + shift for i in range(len(names))], shares, 0.38, label=label)
    for i, s in enumerate(sources):
        at = 100 * s["taken"] / max(1, taken), i - 0.2
        axis.annotate(f"  {s['epochs']:.3g} epochs", at, va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.grid(False, axis="y")
    axis.grid(True, axis="x")
    axis.margins(x=0.12)
    axis.set_xlabel("% of tokens")
    axis.set_title(f"{tokens_text(inspection['tokens'])} tokens from {tokens_text(size)} (estimated)")
    axis.legend(loc="best")


def _plot_languages(axis, name: str, languages: dict):
    ordered = sorted(languages.items(), key=lambda item: -item[1]["tokens"])
    style = "marked" if len(ordered) < 60 else "plain"
    lines = [
        Line(label, [(rank, max(1, language[key])) for rank, (_, language) in enumerate(ordered, 1)], colour, style)
        for colour, (key, label) in enumerate((("tokens", "in the corpus"), ("taken", "in the run")))
    ]
    draw_lines(axis, lines, log=True)
    axis.set_ylabel("tokens")
    axis.set_title(f"{name}: {len(ordered)} languages, largest first")
    if len(ordered) <= 40:
        names = [language for language, _ in ordered]
        axis.set_xticks(range(1, len(names) + 1), names, rotation=60, ha="right", fontsize=7)
    epochs = axis.twinx()
    repeats = [language["epochs"] for _, language in ordered]
    epochs.plot(range(1, len(repeats) + 1), repeats, color="grey", linewidth=1, linestyle=":")
    epochs.set_ylabel("epochs (dotted)")
    epochs.set_ylim(bottom=0)
    epochs.grid(False)
    axis.legend(loc="lower left")
    axis.set_xlabel("language, by size")


def _note(expected, rule: str, budget_epochs: int) -> str:
    if budget_epochs and expected.taken:
        return f"read {budget_epochs} times, to the document" if budget_epochs > 1 else "read once, to the document"
    if expected.used_up_at is not None:
        after = {"stop": "the run stops there", "redistribute": "then the others take over"}[rule]
        return f"used up after {tokens_text(expected.used_up_at)} tokens; {after}"
    if not expected.taken:
        return "not used"
    if expected.epochs < 1:
        return f"{1 - expected.epochs:.0%} left over"
    return f"read {expected.epochs:.2f} times" if expected.epochs > 1.05 else "read once"


def _shared(source: Source, lanes: int) -> str:
    """Return what it costs that lanes share files or row groups (docs/data.md), where several read one."""
    count = len(source.units)
    if is_pooled(source) or count >= lanes or not shares_units(source, lanes):
        return ""
    what = "one file, which cannot be cut, is" if count == 1 else f"{count} files or row groups are"
    return (
        f"; its {what} read by {lanes if count == 1 else -(-lanes // count) + 1} of the {lanes} lanes each, in every epoch and "
        "at every resume, to find their own documents: write more and smaller ones to save that"
    )


def _source_table(inspection: dict) -> Table:
    headings = ("files", "bytes", "tokens", "per byte", "share", "taken", "epochs")
    table = _table(f"budget: {tokens_text(inspection['budget'])} tokens", "source", headings)
    for name, s in inspection["sources"].items():
        texts = sum(x["tokens"] / x["tokens_per_byte"] for x in s["languages"].values() if x["tokens_per_byte"])
        per_byte = f"{s['tokens'] / texts:.3f}" if texts else "-"
        numbers = (f"{s['files']:,}", tokens_text(s["bytes"]), tokens_text(s["tokens"]), per_byte, f"{s['share']:.2%}")
        table.add_row(name, *numbers, tokens_text(s["taken"]), f"{s['epochs']:.3g}")
    table.add_section()
    totals = [sum(s[k] for s in inspection["sources"].values()) for k in ("files", "bytes", "tokens", "taken")]
    files, size, tokens, taken = totals
    table.add_row("all", f"{files:,}", tokens_text(size), tokens_text(tokens), "", "", tokens_text(taken), "")
    return table


def _language_table(name: str, languages: dict) -> Table:
    """Return a table of the most and the least repeated languages."""
    ordered = sorted(languages.items(), key=lambda item: (-item[1]["epochs"], item[0]))
    title = f"{name}: {len(languages)} languages, the most repeated first"
    table = _table(title, "language", ("bytes", "tokens", "per byte", "taken", "epochs"))
    for i, (language, x) in enumerate(ordered):
        if _SHOWN <= i < len(ordered) - _SHOWN:
            if i == _SHOWN:
                table.add_row(f"... {len(ordered) - 2 * _SHOWN} more")
            continue
        numbers = (
            tokens_text(x["bytes"]),
            tokens_text(x["tokens"]),
            f"{x['tokens_per_byte']:.3f}",
            tokens_text(x["taken"]),
        )
        table.add_row(language, *numbers, f"{x['epochs']:.3g}")
    return table


def _table(title: str, first: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
