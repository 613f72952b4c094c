"""The report: one HTML file that holds all it shows. Its layout is the template report.html; here are its values."""

from datetime import UTC, datetime
from html import escape
from pathlib import Path

from easylm_mling.errors import without_secrets
from easylm_mling.formatting import duration_text, tokens_text
from easylm_mling.model.flops import model_flops
from easylm_mling.model.params import parameter_count
from easylm_mling.monitoring.report.collect import Findings, collect
from easylm_mling.monitoring.report.svg import COLOURS, Line, chart, number_text, sparkline
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.object_store import Bucket, is_bucket

_CURVES, _ROWS = 16, 100
_ENDED = {
    "done": ("done", "good"),
    "stopped": ("stopped", "good"),
    "preempted": ("preempted", "warn"),
    "failed": ("failed", "bad"),
}
_SPENT = {
    "step": "training steps", "evaluation": "evaluation", "save": "blocked on saves", "compile": "compiling", "restore": "restoring",
    "init": "starting", "lost": "steps done again", "idle": "between attempts",
}  # fmt: skip


def write_report(run_dir: str | Path, output: str | Path | None = None) -> str:
    """Write the page about the run, by default to RUN/report.html; raises ConfigError where there is no run."""
    written = page(collect(run_dir)).encode()
    if is_bucket(run_dir) and not output:
        Bucket(str(run_dir)).write_all({"report.html": written})
    else:
        write_atomically(output or Path(run_dir) / "report.html", written)
    return str(output or f"{run_dir}/report.html")


def page(found: Findings) -> str:
    """The whole HTML document."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is loaded and nothing runs, even if something of the run's had come through as markup.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(found.name)}</title><style>{style}</style>"
    )
    parts = (
        _top(found),
        _losses(found),
        _data(found),
        _speed(found),
        _health(found),
        _history(found),
        _settings(found),
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def _top(found: Findings) -> str:
    config, train, model = found.config, found.train, found.config.model
    tokens, budget = train.get("tokens", 0), config.train.budget_tokens
    share = found.goodput.share()
    rate, mfu, left = train.get("tokens_per_second"), train.get("mfu"), train.get("seconds_to_budget")
    last_save = next((e for e in reversed(found.saves) if e["event"] == "saved"), None)
    tiles = [
        ("step", f"{found.step:,}", f"of {config.total_steps:,}"),
        ("tokens", tokens_text(tokens), f"{min(1, tokens / budget):.1%} of {tokens_text(budget)}"),
        ("loss", _loss(train.get("loss")), "nats a token, last batch"),
        (
            "held out",
            _loss(found.evaluation.get("loss")),
            f"{_loss(found.evaluation.get('bits_per_byte'))} bits a byte",
        ),
        ("speed", tokens_text(rate), "tokens a second" + (f", MFU {mfu:.1%}" if mfu else "")),
        ("goodput", "-" if share is None else f"{share:.1%}", f"{len(found.attempts)} attempts"),
        ("left", "-" if found.step >= config.total_steps else duration_text(left), "at the last speed"),
        (
            "checkpoint",
            f"{last_save['step']:,}" if last_save else "-",
            _when(last_save["time"]) if last_save else "none yet",
        ),
    ]
    shown = "".join(
        f"<div><span>{name}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>"
        for name, value, note in tiles
    )
    written = datetime.now(UTC).isoformat(timespec="seconds")
    about = f"{model.model_type}, {parameter_count(model):,} parameters; {config.tokens_per_step:,} tokens a step"
    return (
        f'<h1>{escape(found.name)}</h1><p>{_state(found)}</p><p class="soft">{escape(about)}. Written {_when(written)}.</p>'
        f'<div class="tiles">{shown}</div>'
    )


def _state(found: Findings) -> str:
    if not found.attempts:
        return '<span class="state">not begun</span>'
    last = found.attempts[-1]
    if last.end is None:
        return f'<span class="state warn">running, or killed</span>; last sign of life {_when(last.seen)}'
    word, look = _ENDED[last.end["event"]]
    why = escape(str(last.end.get("error") or last.end.get("why") or ""))
    return f'<span class="state {look}">{word}</span> {_when(last.end["time"])}' + (f"; {why}" if why else "")


def _losses(found: Findings) -> str:
    marks = _marks(found)
    of_all = [
        Line("training", found.curves["loss"].points, 0, "faint"),
        Line("held out", found.validation.points, 1, "marked"),
    ]
    names = _largest(found)
    each = [Line(n, found.held_out[n].points, i, "marked") for i, n in enumerate(names) if n in found.held_out]
    train = [Line(n, found.training[n].points, i) for i, n in enumerate(names) if n in found.training]
    languages = sorted(found.languages, key=lambda key: -_tokens(found, *key))[:_CURVES]
    one = len({n for n, _ in languages}) == 1
    spoken = [
        Line(v if one else f"{n}: {v}", found.languages[n, v].points, i, "marked") for i, (n, v) in enumerate(languages)
    ]
    charts = (
        chart("Loss", of_all, marks=marks, unit="nats a token"),
        chart("Held-out loss of each source", each, marks=marks, unit="nats a token"),
        chart("Training loss of each source", train, marks=marks, unit="nats a token"),
        chart("Held-out loss of each language", spoken, marks=marks, unit="nats a token"),
    )
    return _section("Loss", "".join(charts) or _nothing("No step is logged yet."), grid=True)


def _data(found: Findings) -> str:
    ledger = found.train.get("ledger", {})
    if not ledger:
        return ""
    total = max(1, sum(s["tokens"] for s in ledger.values()))
    rows = []
    for name, s in sorted(ledger.items(), key=lambda item: -item[1]["tokens"])[:_ROWS]:
        share, wanted = s["tokens"] / total, s["wanted"]
        bar = (
            f'<span class="share bar"><i class="c0" style="width:{100 * min(1, share):.1f}%"></i>'
            f'<u style="left:{100 * min(1, wanted):.1f}%"></u></span>'
        )
        curve = found.held_out[name].points if name in found.held_out else []
        epochs = "-" if s["epochs"] is None else f"{s['epochs']:.2f}"
        rows.append(
            (escape(name), f"{wanted:.2%}", f"{share:.2%}", bar, tokens_text(s["tokens"]), f"{s['documents']:,}", epochs,
             f"{s['bad']:,}", *_first_last(curve))
        )  # fmt: skip
    heads = (
        "<source",
        "planned",
        "consumed",
        "",
        "tokens",
        "documents",
        "epochs",
        "bad records",
        "held out at first",
        "now",
        "",
    )
    parts = [_table(heads, rows, f"and {len(ledger) - _ROWS} more" if len(ledger) > _ROWS else "")]
    parts.append('<p class="soft">The bar is the share consumed, the upright mark in it the plan.</p>')
    spoken = []
    pairs = [(s, lang, c) for s, each in found.counted.items() for lang, c in each.items()]
    for source, language, c in sorted(pairs, key=lambda p: -p[2]["tokens"])[:_ROWS]:
        curve = found.languages[source, language].points if (source, language) in found.languages else []
        epochs = "-" if c["epochs"] is None else f"{c['epochs']:.2f}"
        cells = (escape(language), escape(source), tokens_text(c["tokens"]), f"{c['documents']:,}", epochs)
        spoken.append((*cells, *_first_last(curve)))
    if spoken:
        heads = ("<language", "<source", "tokens", "documents", "epochs", "held out at first", "now", "")
        more = f"and {len(pairs) - _ROWS} more" if len(pairs) > _ROWS else ""
        parts.append(f"<h2>Languages, at the last checkpoint</h2>{_table(heads, spoken, more)}")
    return _section("Data: what was consumed, beside the plan", "".join(parts))


def _speed(found: Findings) -> str:
    marks, curves = _marks(found), found.curves
    waits = [
        Line("a step", curves["step_seconds"].points, 0),
        Line("waiting for data", curves["data_wait_seconds"].points, 1),
    ]
    charts = (
        chart("Throughput", [Line("", curves["tokens_per_second"].points)], marks=marks, unit="tokens a second"),
        chart(
            "MFU",
            [Line("", [(x, 100 * y) for x, y in curves["mfu"].points])],
            marks=marks,
            unit="% of the chips' bf16 peak",
        ),
        chart("Seconds of a step", waits, log=True, marks=marks),
        chart(
            "Memory",
            [Line("", [(x, y / 2**30) for x, y in curves["hbm_peak_bytes"].points])],
            marks=marks,
            unit="GiB a chip, peak",
        ),
    )
    flops = model_flops(found.config.model, found.config.data.sequence_length) / found.config.data.sequence_length
    note = "Upright lines are restarts; speeds are means of eight lines of metrics.jsonl. " + (
        ""
        if curves["mfu"].points
        else f"The peak of these devices is not known, so there is no MFU ({flops:.3g} FLOPs a token)."
    )
    return _section("Speed", "".join(charts), grid=True) + f'<p class="soft">{note}</p>' + _goodput(found)


def _goodput(found: Findings) -> str:
    seconds = found.goodput.seconds
    total = sum(seconds.values())
    if not total:
        return ""
    order = [k for k in _SPENT if seconds[k] > 0]
    bar = "".join(f'<i class="c{i}" style="width:{100 * seconds[k] / total:.2f}%"></i>' for i, k in enumerate(order))
    legend = "".join(
        f'<li><i class="key c{i}"></i>{_SPENT[k]} <b>{duration_text(seconds[k])}</b> ({seconds[k] / total:.1%})</li>'
        for i, k in enumerate(order)
    )
    body = f'<div class="card"><div class="bar">{bar}</div><ul class="legend">{legend}</ul></div>'
    return _section(f"Goodput {found.goodput.share() or 0:.1%} of {duration_text(total)}", body)


def _health(found: Findings) -> str:
    per_step, curves = found.config.tokens_per_step, found.curves
    skips = [(float(s * per_step), "x") for s in found.skips]
    charts = (
        chart("Gradient norm", [Line("", curves["gradient_norm"].points)], log=True, marks=skips),
        chart("Learning rate", [Line("", curves["learning_rate"].points, 2)]),
        chart("Parameter norm", [Line("", curves["parameter_norm"].points, 3)]),
    )
    skipped, spikes = found.train.get("skipped", 0), found.train.get("spikes", 0)
    note = "Every step was finite and none was left out."
    if skipped:
        note = f"{skipped:,} steps changed nothing: {spikes:,} were spikes, the others not finite (x in the gradient norm)."
    return _section("Gradient and optimizer", "".join(charts), grid=True) + f'<p class="soft">{note}</p>'


def _history(found: Findings) -> str:
    rows = []
    for i, a in enumerate(found.attempts):
        after = found.attempts[i + 1] if i + 1 < len(found.attempts) else None
        again = max(0, a.last - after.first + 1) if after and after.first else 0
        word, look = _ENDED[a.end["event"]] if a.end else ("killed" if after else "running, or killed", "warn")
        why = str(a.end.get("error") or a.end.get("why") or "") if a.end else ""
        steps = f"{a.first:,} to {a.last:,}" if a.first else "-"
        where = (
            f"{a.start.get('devices', '-')} x {a.start.get('device_kind', '-')}, {a.start.get('hosts', '-')} host"
            + ("s" if a.start.get("hosts") != 1 else "")
        )
        rows.append((str(a.number), _when(a.start["time"]), steps, f"{again:,}" if again else "",
                     f'<span class="{look}">{word}</span>', escape(where), f'<span class="wide">{escape(why)}</span>'))  # fmt: skip
    heads = ("<attempt", "<began", "<steps", "done again", "<ended", "<on", "<why")
    saves = []
    for e in reversed(found.saves):
        size = f"{e['bytes'] / 1e6:,.0f} MB" if "bytes" in e else ""
        seconds = f"{e['seconds']:.2f} s" if "seconds" in e else ""
        look = "bad" if e["event"] == "save_failed" else ""
        note = e.get("problem") or (
            f"from step {e['from_step']}, leaving out {e['skip_batches']} batches" if "from_step" in e else ""
        )
        saves.append((f"{e['step']:,}", f'<span class="{look}">{escape(e["event"].replace("_", " "))}</span>', _when(e["time"]), seconds, size,
                      f'<span class="wide">{escape(str(note))}</span>'))  # fmt: skip
    parts = [_section("Attempts", _table(heads, rows))] if rows else []
    if saves:
        title = f"Checkpoints: {found.saved:,} saved, {found.failed_saves:,} failed"
        heads = ("<step", "<what", "<when", "stood still", "size", "<")
        parts.append(
            _section(
                title, _table(heads, saves[:_ROWS], "older ones are in events.jsonl" if len(saves) > _ROWS else "")
            )
        )
    news = [(f"{step:,}", f'<span class="wide">{escape(str(text))}</span>') for step, text in reversed(found.news)]
    news += [(f"{e['step']:,}", f"exported in {escape(str(e.get('dtype')))}") for e in found.exports]
    if news:
        parts.append(_section("News", _table(("<step", "<what"), news)))
    return "".join(parts)


def _settings(found: Findings) -> str:
    start = found.attempts[-1].start if found.attempts else {}
    about = {k: start[k] for k in ("hosts", "devices", "device_kind", "mesh") if k in start} | start.get("versions", {})
    rows = [
        (escape(str(k)), escape(", ".join(f"{a} {b}" for a, b in v.items()) if isinstance(v, dict) else str(v)))
        for k, v in about.items()
    ]
    text = f'<div class="card"><details><summary>config.yaml</summary><pre>{escape(without_secrets(found.config_text))}</pre></details></div>'
    parts = _section("Config", text)
    return parts + (_section("Environment, of the last attempt", _table(("<", "<"), rows)) if rows else "")


def _marks(found: Findings) -> list[tuple[float, str]]:
    per_step = found.config.tokens_per_step
    return [(step * per_step, "restart" if len(found.restarts) < 6 else "") for step in found.restarts]


def _largest(found: Findings) -> list[str]:
    """Sources in the order of the config, the largest ones if there are many."""
    ledger, names = found.train.get("ledger", {}), list(found.config.data.sources)
    most = sorted(names, key=lambda n: -ledger.get(n, {}).get("tokens", 0))[: 2 * COLOURS]
    return [n for n in names if n in most]


def _tokens(found: Findings, source: str, language: str) -> int:
    return found.counted.get(source, {}).get(language, {}).get("tokens", 0)


def _first_last(curve: list) -> tuple[str, str, str]:
    return (_loss(curve[0][1]), _loss(curve[-1][1]), sparkline(curve)) if curve else ("-", "-", "")


def _loss(x: float | None) -> str:
    return "-" if x is None else number_text(round(x, 4))


def _when(time: str) -> str:
    return escape(time[:16].replace("T", " ")) + " UTC"


def _section(title: str, body: str, grid: bool = False) -> str:
    return f"<h2>{escape(title)}</h2>" + (f'<div class="charts">{body}</div>' if grid else body)


def _nothing(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _table(heads: tuple, rows: list[tuple], more: str = "") -> str:
    """Cells are HTML already. A head that begins with < is that of a column of text, which stands to the left."""
    text = [" class=text" if h.startswith("<") else "" for h in heads]
    top = "".join(f"<th{c}>{escape(h.lstrip('<'))}</th>" for h, c in zip(heads, text, strict=True))
    lines = ("".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, text, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    note = f'<p class="soft">{escape(more)}</p>' if more else ""
    return f'<div class="card"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>{note}</div>'
