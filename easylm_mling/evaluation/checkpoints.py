"""The command `eval RUN --all`: every kept checkpoint on one suite, and which is the best."""

from dataclasses import replace
from pathlib import Path

import orjson
from rich.console import Console

from easylm_mling.charts import draw_lines, draw_png
from easylm_mling.checkpoint.best import write_best
from easylm_mling.checkpoint.layout import committed_steps
from easylm_mling.distributed.agreement import broadcast, broadcast_bytes, is_primary, primary_first
from easylm_mling.errors import ConfigError, check
from easylm_mling.evaluation.command import evaluate_model
from easylm_mling.evaluation.options import EvalOptions, identity_of_checkpoint
from easylm_mling.evaluation.results import Results, read_results
from easylm_mling.evaluation.scoring.suites import harness_is_there
from easylm_mling.evaluation.selection import Candidate, choose
from easylm_mling.monitoring.console import say
from easylm_mling.monitoring.report.collect import collect
from easylm_mling.monitoring.report.page import forgetting_lines, suite_lines, write_report
from easylm_mling.storage.object_store import is_bucket


def evaluate_run(options: EvalOptions, console: Console) -> Candidate | None:
    """Evaluate every kept checkpoint of a run, print their table, draw them, and return the best (in the primary process).

    What is done is not done again, unless the tasks or the harness have changed since. Raises ConfigError for what is no run
    on this machine's disks, and as `evaluate_model`. Collective.
    """
    check(
        not is_bucket(options.model),
        "--all: results are kept in the run's folder; name a run on a disk, not in a bucket",
    )
    steps = orjson.loads(broadcast_bytes(orjson.dumps(committed_steps(options.model))))
    check(bool(steps), f"{options.model}: holds no checkpoints; --all is of a run")
    with primary_first(repr(options)):
        rows, tasks = _load(options) if is_primary() else ([], {})
    results: dict[int, Results] = {}
    for step in steps:
        done = _done(options, step, tasks, console) if is_primary() else None
        if not broadcast(int(done is not None)):
            say(console, f"step {step}:")
            done = evaluate_model(replace(options, step=step), console, rows)
        if done is not None:
            results[step] = done
    return _report(options, results, console) if is_primary() else None


def _load(options: EvalOptions) -> tuple[list, dict[str, str]]:
    """Return the suite's rows and the digests of their tasks."""
    check(harness_is_there(), "eval: lm-evaluation-harness is missing; run pip install 'easylm-mling[eval]'")
    from easylm_mling.evaluation.scoring.tasks import load_rows, task_digests  # imports lm_eval

    rows = load_rows(options.suite)
    return rows, task_digests(rows)


def _done(options: EvalOptions, step: int, tasks: dict[str, str], console: Console) -> Results | None:
    """Return the results of a step if they are there and were measured the same way, on the same items."""
    file = Path(options.model) / "evaluations" / str(step) / f"results-{options.name}.json"
    if not file.is_file():
        return None
    try:
        results = read_results(file)
    except ConfigError:
        return None
    # A step may have been done again after a rewind: its weights count, not its number.
    asked = {"suite": options.suite.name, "limit": options.limit, "asked": options.asked}
    asked["weights"] = identity_of_checkpoint(replace(options, step=step))
    if {key: results.about.get(key) for key in asked} != asked:
        return None
    then = results.about.get("tasks") or {}
    if changed := sorted(name for name in tasks.keys() | then.keys() if tasks.get(name) != then.get(name)):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        say(
            console,
            f"step {step} is evaluated again: {', '.join(changed[:3])}{more}, or the harness, has changed since "
            f"(lm_eval {results.about.get('lm_eval')} then), and scores of other items are not mixed",
        )
        return None
    return results


def _report(options: EvalOptions, results: dict[int, Results], console: Console) -> Candidate:
    best, candidates = choose(results)
    say(console, "| step | centred mean, choosing half | other half |\n| ---: | ---: | ---: |")
    for c in candidates:
        say(console, f"| {c.step}{' (best)' if c == best else ''} | {c.choosing:.4f} | {c.reported:.4f} |")
    if options.limit:
        say(console, "with --limit the best is not noted: it would be chosen by a few items of each task")
        return best
    about = {"by": "the centred mean of one half of the items", "on_the_other_half": best.reported}
    file = write_best(options.model, options.name, best.step, {**about, "steps": [vars(c) for c in candidates]})
    say(
        console,
        f"the best is step {best.step}: chosen on one half of the items, and {best.reported:.4f} on the other ({file})",
    )
    picture = draw_scores(options.model, options.name)
    say(console, f"{picture} and {write_report(options.model)} show the scores over the run")
    return best


def draw_scores(run: str | Path, suite: str) -> Path:
    """Draw a suite's scores over tokens, and beside them what became of held-out text; return the PNG file."""
    history, file = collect(run), Path(run) / "evaluations" / f"scores-{suite}.png"
    best = history.best.get(suite)
    panels = [
        (
            f"{suite}: score" + (f" (dotted: step {best}, the best)" if best is not None else ""),
            suite_lines(history, suite),
        ),
        ("held-out text: bits a byte since the beginning (above 0: forgotten)", forgetting_lines(history)),
    ]
    with draw_png(file, 14, 4.5) as figure:
        axes = figure.subplots(1, 2)
        if best is not None:
            axes[0].axvline(history.config.step_tokens.at(best), color="gray", linestyle=":")
        for axis, (title, lines) in zip(axes, panels, strict=True):
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("tokens")
            if lines:
                draw_lines(axis, lines)
                axis.legend(frameon=False, fontsize=8)
    return file
