"""The report: one HTML file that holds all it shows. Its layout is the template report.html; here are its values."""

from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from easylm_mling.charts import COLOURS, Line, Point, draw_svg, number_text
from easylm_mling.errors import without_secrets
from easylm_mling.formatting import duration_text, tokens_text
from easylm_mling.hardware import GiB
from easylm_mling.model.flops import model_flops
from easylm_mling.model.params import parameter_count, trained_count
from easylm_mling.monitoring.console import epochs_text
from easylm_mling.monitoring.report.collect import RunHistory, collect
from easylm_mling.monitoring.report.curve import Curve
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.object_store import Bucket, is_bucket

_LANGUAGE_LINES, _ROWS = 16, 100
# Classes of report.css by how an attempt ended.
_LOOKS = {"done": "good", "stopped": "good", "preempted": "warn", "failed": "bad"}
# Goodput's kinds in the order of the bar.
_KINDS = {
    "step": "training steps", "evaluation": "evaluation", "save": "blocked on saves", "compile": "compiling", "restore": "restoring",
    "init": "starting", "lost": "steps done again", "idle": "between attempts", "tasks": "scoring tasks",
}  # fmt: skip


def write_report(run_dir: str | Path, output: str | Path | None = None) -> str:
    """Write the report about a run, by default to RUN/report.html, and return its path.

    Raises ConfigError where there is no run.
    """
    html = page(collect(run_dir)).encode()
    if is_bucket(run_dir) and not output:
        Bucket(str(run_dir)).write_all({"report.html": html})
    else:
        write_atomically(output or Path(run_dir) / "report.html", html)
    return str(output or f"{run_dir}/report.html")


def page(run: RunHistory) -> str:
    """Render the HTML document."""
    config, model = run.config, run.config.model
    seconds, total = run.goodput.seconds, run.goodput.total()
    flops = model_flops(model, config.data.sequence_length, config.lora) / config.data.sequence_length
    trained = f", {trained_count(model, config.lora):,} of adapters are trained" if config.lora else ""
    no_mfu = f"The peak of these devices is not known, so there is no MFU ({flops:.3g} FLOPs a token)."
    return _template().render(
        run=run,
        rows=_ROWS,
        colours=len(COLOURS),
        about=f"{model.model_type}, {parameter_count(model):,} parameters{trained}; {config.tokens_per_step:,} tokens a step",
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        tiles=_tiles(run),
        loss_charts=_loss_charts(run),
        task_charts=_task_charts(run),
        task_rows=_task_rows(run),
        score_charts=_score_charts(run),
        sources=_sources(run),
        languages=_languages(run),
        speed_charts=_speed_charts(run),
        no_mfu="" if run.curves["mfu"].points else no_mfu,
        goodput=[
            {"name": name, "seconds": seconds[kind], "share": seconds[kind] / total}
            for kind, name in _KINDS.items()
            if seconds[kind] > 0
        ],
        optimizer_charts=_optimizer_charts(run),
        attempts=_attempts(run),
        checkpoints=list(reversed(run.checkpoint_events)),
        config_text=without_secrets(run.config_text),
        environment=_environment(run),
    )


def _template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": "{:,}".format,
        "duration": duration_text,
        "epochs": epochs_text,
        "loss": _loss_text,
        "number": number_text,
        "polyline": _polyline,
        "time": _time_text,
        "tokens": tokens_text,
        "width": lambda share: f"{100 * min(1, share):.2f}%",
    }
    return environment.get_template("report.html")


def _tiles(run: RunHistory) -> list[tuple[str, str, str]]:
    """Name, value and note of each figure at the top."""
    train, steps, budget = run.train, run.config.total_steps, run.config.budget_tokens
    tokens, share, mfu = train.get("tokens", 0), run.goodput.share(), train.get("mfu")
    time_left = "-" if run.step >= steps else duration_text(train.get("seconds_to_budget"))
    bits = f"{_loss_text(run.evaluation.get('bits_per_byte'))} bits a byte"
    last_save = next((event for event in reversed(run.checkpoint_events) if event["event"] == "saved"), None)
    saved_at = _time_text(last_save["time"]) if last_save else "none yet"
    return [
        ("step", f"{run.step:,}", f"of {steps:,}"),
        ("tokens", tokens_text(tokens), f"{min(1, tokens / budget):.1%} of {tokens_text(budget)}"),
        ("loss", _loss_text(train.get("loss")), "nats a token, last batch"),
        ("held out", _loss_text(run.evaluation.get("loss")), bits),
        ("speed", tokens_text(train.get("tokens_per_second")), f"tokens a second{f', MFU {mfu:.1%}' if mfu else ''}"),
        ("goodput", "-" if share is None else f"{share:.1%}", f"{len(run.attempts)} attempts"),
        ("left", time_left, "at the last speed"),
        ("checkpoint", f"{last_save['step']:,}" if last_save else "-", saved_at),
    ]


def _loss_charts(run: RunHistory) -> list[dict | None]:
    names = list(enumerate(_largest_sources(run)))
    tokens = {(row["source"], row["name"]): row["tokens"] for row in _languages(run)}
    keys = sorted(run.languages, key=lambda key: -tokens.get(key, 0))[:_LANGUAGE_LINES]
    one_source = len({source for source, _ in keys}) == 1
    languages = [
        Line(language if one_source else f"{source}: {language}", run.languages[source, language].points, i, "marked")
        for i, (source, language) in enumerate(keys)
    ]
    training = Line("training", run.curves["loss"].points, 0, "faint")
    validation = Line("held out", run.validation.points, 1, "marked")
    average = Line("held out, averaged parameters", run.validation_of_average.points, 2, "marked")
    each_held_out = [Line(n, run.held_out[n].points, i, "marked") for i, n in names if n in run.held_out]
    each_training = [Line(n, run.training[n].points, i) for i, n in names if n in run.training]
    stops = [Line(n, run.stop_rates[n].points, i, "marked") for i, n in names if n in run.stop_rates]
    common: Any = {"unit": "nats a token", "marks": _restarts(run)}
    return [
        _chart("Loss", training, validation, *[average] * bool(average.points), **common),
        _chart("Held-out loss of each source", *each_held_out, **common),
        _chart("Training loss of each source", *each_training, **common),
        _chart("Held-out loss of each language", *languages, **common),
        _chart("Stop rate of held-out answers", *stops, **{**common, "unit": "probability of the end token"}),
    ]


def _task_charts(run: RunHistory) -> list[dict | None]:
    rows = list(dict.fromkeys(row for _, row in run.tasks))[: 2 * len(COLOURS)]

    def lines(key: str) -> list[Line]:
        each = [
            Line(row, run.tasks[key, row].points, i, "marked") for i, row in enumerate(rows) if (key, row) in run.tasks
        ]
        return each if len(each) < 2 else [Line("mean", run.tasks[key, ""].points, len(rows), "marked"), *each]

    common: Any = {"marks": _restarts(run)}
    return [
        _chart("Right answers of tasks", *lines("bits_per_byte"), unit="bits a byte", **common),
        _chart("Centred accuracy on tasks", *lines("centred_accuracy"), unit="0: chance, 1: all right", **common),
    ]


def _task_rows(run: RunHistory) -> list[tuple]:
    """Return for each row of the suite its name, and the points of its bits a byte and of its centred accuracy."""
    names = dict.fromkeys(row for _, row in run.tasks if row)
    curves = [[run.tasks.get((key, row)) for key in ("bits_per_byte", "centred_accuracy")] for row in names]
    return [(row, *(c.points if c else [] for c in both)) for row, both in zip(names, curves, strict=True)][:_ROWS]


def suite_lines(run: RunHistory, suite: str) -> list[Line]:
    """Return the scores of a suite's rows over tokens, as `eval` wrote them."""
    rows = [row for name, row in run.scores if name == suite][: 2 * len(COLOURS)]
    return [Line(row, run.scores[suite, row].points, i, "marked") for i, row in enumerate(rows)]


def forgetting_lines(run: RunHistory) -> list[Line]:
    """Return the change of held-out bits a byte since the first measurement: above 0 a source or language is forgotten."""
    curves = [(name, c.points) for name, c in run.held_out_bits.items() if len(c.points) > 1][: 2 * len(COLOURS)]
    return [Line(name, [(x, y - p[0][1]) for x, y in p], i, "marked") for i, (name, p) in enumerate(curves)]


def _score_charts(run: RunHistory) -> list[dict | None]:
    charts = []
    for suite in dict.fromkeys(suite for suite, _ in run.scores):
        best = [(float(run.config.step_tokens.at(run.best[suite])), "best")] if suite in run.best else []
        charts.append(_chart(f"Scores on {suite}", *suite_lines(run, suite), marks=best))
    return [
        *charts,
        _chart("Gained and forgotten", *forgetting_lines(run), unit="held-out bits a byte since the first measurement"),
    ]


def _speed_charts(run: RunHistory) -> list[dict | None]:
    restarts, curves = _restarts(run), run.curves
    percent = [(x, 100 * y) for x, y in curves["mfu"].points]
    gib = [(x, y / GiB) for x, y in curves["hbm_peak_bytes"].points]
    waiting = Line("waiting for data", curves["data_wait_seconds"].points, 1)
    return [
        _chart("Throughput", Line("", curves["tokens_per_second"].points), unit="tokens a second", marks=restarts),
        _chart("MFU", Line("", percent), unit="% of the chips' bf16 peak", marks=restarts),
        _chart("Seconds of a step", Line("a step", curves["step_seconds"].points), waiting, log=True, marks=restarts),
        _chart("Memory", Line("", gib), unit="GiB a chip, peak", marks=restarts),
    ]


def _optimizer_charts(run: RunHistory) -> list[dict | None]:
    skips = [(float(run.config.step_tokens.at(step)), "x") for step in run.skips]
    return [
        _chart("Gradient norm", Line("", run.curves["gradient_norm"].points), log=True, marks=skips),
        _chart("Learning rate", Line("", run.curves["learning_rate"].points, 2)),
        _chart("Parameter norm", Line("", run.curves["parameter_norm"].points, 3)),
    ]


def _chart(title: str, *lines: Line, unit: str = "", log: bool = False, marks: list | None = None) -> dict | None:
    """A figure of the page over tokens, with a legend of the lines that have a name; None where no line has points."""
    shown = [Line(n.name, [p for p in n.points if not log or p[1] > 0], n.colour, n.style) for n in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return None
    svg = Markup(draw_svg(title, shown, log, marks or []))
    return {"title": title, "unit": unit, "svg": svg, "legend": [line for line in shown if line.name]}


def _restarts(run: RunHistory) -> list[tuple[float, str]]:
    label = "restart" if len(run.restarts) < 6 else ""
    return [(float(run.config.step_tokens.at(step)), label) for step in run.restarts]


def _largest_sources(run: RunHistory) -> list[str]:
    """Sources in the order of the config, the largest ones if there are many."""
    ledger, names = run.train.get("ledger", {}), list(run.config.data.sources)
    largest = sorted(names, key=lambda n: -ledger.get(n, {}).get("tokens", 0))[: 2 * len(COLOURS)]
    return [n for n in names if n in largest]


def _sources(run: RunHistory) -> list[dict]:
    """The ledger's entry of each source, the largest first, with its held-out losses."""
    ledger = run.train.get("ledger", {})
    total = max(1, sum(entry["tokens"] for entry in ledger.values()))
    return [
        {**entry, "name": name, "share": entry["tokens"] / total, "points": run.held_out.get(name, Curve()).points}
        for name, entry in sorted(ledger.items(), key=lambda item: -item[1]["tokens"])
    ]


def _languages(run: RunHistory) -> list[dict]:
    """The ledger's entry of each language, the largest first, with its held-out losses."""
    rows = [
        {**entry, "name": language, "source": source, "points": run.languages.get((source, language), Curve()).points}
        for source, entries in run.consumed_languages.items()
        for language, entry in entries.items()
    ]
    return sorted(rows, key=lambda row: -row["tokens"])


def _attempts(run: RunHistory) -> list[dict]:
    """Each attempt with how it ended, why, and how many of its steps were done again."""
    rows = []
    for attempt, after in zip_longest(run.attempts, run.attempts[1:]):
        outcome = attempt.end["event"] if attempt.end else "killed" if after else "running, or killed"
        again = attempt.last_step - after.first_step + 1 if after and after.first_step else 0
        why = attempt.end.get("error") or attempt.end.get("why") or "" if attempt.end else ""
        row = {"outcome": outcome, "look": _LOOKS.get(outcome, "warn"), "again": max(0, again), "why": why}
        rows.append(vars(attempt) | row)
    return rows


def _environment(run: RunHistory) -> list[tuple[str, str]]:
    start = run.attempts[-1].start if run.attempts else {}
    values = {key: start[key] for key in ("hosts", "devices", "device_kind", "mesh") if key in start}
    values |= start.get("versions", {})
    return [
        (name, ", ".join(f"{axis} {size}" for axis, size in value.items()) if isinstance(value, dict) else str(value))
        for name, value in values.items()
    ]


def _polyline(points: list[Point]) -> str:
    """A curve within 100 by 24 units, for a cell of a table. matplotlib would take a second for a table of them."""
    (left, _), (right, _) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    width, height = right - left or 1, high - low or 1
    return " ".join(f"{2 + 96 * (x - left) / width:.1f},{22 - 20 * (y - low) / height:.1f}" for x, y in points)


def _loss_text(loss: float | None) -> str:
    return "-" if loss is None else number_text(round(loss, 4))


def _time_text(time: str) -> str:
    return f"{time[:16].replace('T', ' ')} UTC"
