"""The command `eval RUN --all`: every kept checkpoint on one suite, and which is the best."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from easylm_mling.checkpoint.best import write_best
from easylm_mling.checkpoint.layout import committed_steps
from easylm_mling.errors import ConfigError, check
from easylm_mling.evaluation.command import evaluate_model
from easylm_mling.evaluation.options import EvalOptions, identity_of_checkpoint
from easylm_mling.evaluation.results import Results, read_results
from easylm_mling.evaluation.selection import Candidate, choose
from easylm_mling.monitoring.console import say
from easylm_mling.storage.object_store import is_bucket


def evaluate_run(options: EvalOptions, console: Console) -> Candidate:
    """Evaluate every kept checkpoint of a run, print their table, and return the best. What is done is not done again.

    Raises ConfigError for what is no run on this machine's disks, and as `evaluate_model`.
    """
    run = Path(options.model)
    check(
        not is_bucket(options.model),
        "--all: results are kept in the run's folder; name a run on a disk, not in a bucket",
    )
    steps = committed_steps(options.model)
    check(bool(steps), f"{options.model}: holds no checkpoints; --all is of a run")
    results = {}
    for step in steps:
        results[step] = _done(run, step, options)
        if results[step] is None:
            say(console, f"step {step}:")
            results[step] = evaluate_model(replace(options, step=step), console)
    best, candidates = choose(results)
    say(console, "| step | centred mean, choosing half | other half |\n| ---: | ---: | ---: |")
    for c in candidates:
        say(console, f"| {c.step}{' (best)' if c == best else ''} | {c.choosing:.4f} | {c.reported:.4f} |")
    if options.limit:
        say(console, "with --limit the best is not noted: it would be chosen by a few items of each task")
        return best
    about = {"by": "the centred mean of one half of the items", "on_the_other_half": best.reported}
    file = write_best(run, options.name, best.step, {**about, "steps": [vars(c) for c in candidates]})
    say(
        console,
        f"the best is step {best.step}: chosen on one half of the items, and {best.reported:.4f} on the other ({file})",
    )
    return best


def _done(run: Path, step: int, options: EvalOptions) -> Results | None:
    """Return the results of a step if they are there and were measured the same way."""
    file = run / "evaluations" / str(step) / f"results-{options.name}.json"
    if not file.is_file():
        return None
    try:
        results = read_results(file)
    except ConfigError:
        return None
    # A step may have been done again after a rewind: its weights count, not its number.
    asked = {"suite": options.suite.name, "limit": options.limit, "asked": options.asked}
    asked["weights"] = identity_of_checkpoint(replace(options, step=step))
    return results if {key: results.about.get(key) for key in asked} == asked else None
