"""The command `eval`: a model's scores on a suite, from the check of its tasks to the table."""

import random
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.distributed.agreement import is_multiprocess, is_primary, primary_first
from easylm_mling.errors import check
from easylm_mling.evaluation.options import EvalOptions, identity, place
from easylm_mling.evaluation.request_cache import RequestCache
from easylm_mling.evaluation.results import (
    Results,
    Score,
    forms_table,
    paired_difference,
    read_results,
    table,
    write_results,
)
from easylm_mling.evaluation.scoring.suites import harness_is_there
from easylm_mling.formatting import duration_text
from easylm_mling.inference.generate import find_tokenizer, load_model, read_model
from easylm_mling.monitoring.console import say, warn
from easylm_mling.storage.atomic import write_atomically

_SEED = 1234  # of Python and numpy while prompts are built: the harness's own


def evaluate_model(options: EvalOptions, console: Console, rows: list | None = None) -> Results | None:
    """Evaluate a model in one form of prompts, print its table and write its results; None but in the primary process.

    Everything that can be checked is, before the model is loaded. Raises ConfigError for what is wrong: tasks, data sets, the
    baseline, the tokenizer, a window the model does not have. `rows`: the suite's, if they are loaded already. Collective.
    """
    results = evaluate_forms(options, [options.form], console, rows)
    return results[0] if results else None


def evaluate_forms(options: EvalOptions, forms: list[str], console: Console, rows: list | None = None) -> list[Results]:
    """As evaluate_model in each of several forms, and their scores side by side; [] but in the primary process."""
    check(harness_is_there(), "eval: lm-evaluation-harness is missing; run pip install 'easylm-mling[eval]'")
    from easylm_mling.evaluation.chat import ChatForm
    from easylm_mling.evaluation.generation import Writer
    from easylm_mling.evaluation.leading import LeadingScorer, LeadingWriter, dismiss, follow
    from easylm_mling.evaluation.scoring.scorer import Scorer
    from easylm_mling.evaluation.scoring.tasks import load_rows  # imports lm_eval

    with primary_first(repr(options)):
        baseline = read_results(options.baseline) if options.baseline else None
        tokenizer = Tokenizer(str(options.tokenizer or find_tokenizer(options.model, options.step)), "--tokenizer ")
        model = read_model(options.model, options.step)
        tokenizer.check_model(model)
        options.window(model)
        chat = ChatForm(tokenizer, options.template) if "chat" in forms else None
        if rows is None and is_primary():
            say(console, f"checking the tasks of {options.suite.name}")
            rows = load_rows(options.suite)
    graph, params, model = load_model(options.model, step=options.step)
    mesh = params["embed_tokens"].sharding.mesh
    leads = is_multiprocess() and is_primary()
    scorer = (LeadingScorer if leads else Scorer)(graph, params, model, mesh, options.dtype)
    writer = (LeadingWriter if leads else Writer)(graph, params, model, tokenizer, options.dtype)
    if not is_primary():
        follow(scorer, writer)
        return []
    try:
        results = [_evaluate(replace(options, form=f), rows or [], scorer, writer, chat, console) for f in forms]
    finally:
        if leads:
            dismiss()
    _, folder = place(options)
    if len(results) == 1:
        _show(console, results[0], baseline)
    else:
        lines = forms_table(*[r.scores for r in results])
        write_atomically(folder / f"results-{options.suite.name}-forms.md", "\n".join([*lines, ""]).encode())
        for line in lines:
            say(console, line)
    say(console, f"written to {folder}")
    return results


def _evaluate(options: EvalOptions, rows: list, scorer: Any, writer: Any, chat: Any, console: Console) -> Results:
    from easylm_mling.evaluation.harness import HarnessModel, Limits
    from easylm_mling.evaluation.scoring.tasks import task_digests

    step, folder = place(options)
    weights = identity(options, step, scorer.model, writer.tokenizer)
    cache = RequestCache(folder / f"requests-{weights}.jsonl")
    if cache.restored:
        say(console, f"{cache.restored:,} answers of earlier evaluations are kept in {folder}")
    chat = chat if options.form == "chat" else None
    length = options.window(scorer.model)
    try:
        lm = HarnessModel(scorer, writer.tokenizer, cache, Limits(length), Meter(console), writer, chat)
        raw = _run(lm, rows, options)
    finally:
        cache.close()
    scores = [score for row in rows for score in _scores(row, raw)]
    about = {
        "model": Path(options.model).name, "step": step, "suite": options.suite.name, "dtype": options.dtype,
        "window": length, "limit": options.limit, "form": options.form, "bos": lm.bos, "lm_eval": version("lm_eval"),
        "asked": options.asked, "weights": weights, "tasks": task_digests(rows), "counts": dict(lm.counts),
    } | ({"template": options.template} if chat else {})  # fmt: skip
    return write_results(folder, options.name, about, scores, raw, _notes(about))


def _run(lm: Any, rows: list, options: EvalOptions) -> dict:
    from lm_eval.evaluator import evaluate

    is_chat = options.form == "chat"
    for row in rows:
        row.seed()  # another form has the same shots

    tasks = {name: task for row in rows for name, task in row.tasks.items()}
    groups = {name: group for row in rows for name, group in row.groups.items()}
    random.seed(_SEED)
    np.random.seed(_SEED)
    raw: Any = evaluate(
        lm,
        {"tasks": tasks, "groups": groups},
        limit=options.limit,
        bootstrap_iters=1000,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
    )
    return raw


def _scores(row: Any, raw: dict) -> list[Score]:
    """Return the scores of one row: of its group if it is one, else of each of its tasks."""
    group = row.groups.get(row.row.task)
    out = []
    for task in [row.row.task] if group else sorted(row.tasks):
        measured = raw["results"].get(task, {}) | (raw.get("groups", {}).get(task, {}) if group else {})
        kept = {k: v for k, v in measured.items() if isinstance(v, (int, float)) and "," in k and "_stderr," not in k}
        for key, value in kept.items():
            measure, variant = key.split(",", 1)
            if row.row.measure not in (None, measure):
                continue
            error = measured.get(f"{measure}_stderr,{variant}")
            weights = (
                [m.weight_by_size for m in (group.aggregate_metric_list or ()) if measure in m.metric] if group else []
            )
            out.append(
                Score(
                    row.row.name if group or len(row.tasks) == 1 else task, task, measure, variant, float(value),
                    float(error) if isinstance(error, (int, float)) else None,
                    str(raw["versions"].get(task, "-")), row.shots, row.splits, sorted(row.tasks) if group else [task],
                    all(weights),
                )
            )  # fmt: skip
    check(
        bool(out),
        f"{row.row.task}: it has no measure {row.row.measure or 'at all'}; of its results there are "
        f"{', '.join(sorted(k for t in row.tasks for k in raw['results'].get(t, {}) if ',' in k)) or 'none'}",
    )
    return out


def _notes(about: dict) -> list[str]:
    counts = about["counts"]
    form = "plain form (no chat template)"
    if about["form"] == "chat":
        form = f"chat form (template: {about['template']}; shots are turns; no score to compare with the plain form's)"
    notes = [
        f"lm-evaluation-harness {about['lm_eval']}, {form}, "
        + (f"one BOS (id {about['bos'][0]})" if about["bos"] else "no BOS")
        + f", window of {about['window']:,} tokens, computed in {about['dtype']}."
    ]
    if about["limit"]:
        notes.append(f"Only the first {about['limit']:,} items of each task: no score to publish.")
    if counts.get("contexts cut"):
        asked = sum(counts.get(k, 0) for k in ("log-likelihoods", "generations"))
        notes.append(
            f"{counts['contexts cut']:,} of {asked:,} contexts were longer than the window and were cut on the left."
        )
    if counts.get("empty continuations"):
        notes.append(f"{counts['empty continuations']:,} continuations were empty, and have log-likelihood 0.")
    return notes


def _show(console: Console, results: Results, baseline: Results | None):
    differences = None
    if baseline:
        theirs, ours = (r.about.get("form", "plain") for r in (baseline, results))
        check(theirs == ours, f"--baseline: it has prompts in the {theirs} form, and these are in the {ours} form")
        then, now = (r.about.get("tasks") or {} for r in (baseline, results))
        if changed := sorted(name for name in then.keys() & now.keys() if then[name] != now[name]):
            warn(
                console,
                f"--baseline: {', '.join(changed[:3])} asked otherwise then, or by another harness (lm_eval "
                f"{baseline.about.get('lm_eval')}); evaluate it again for a fair difference",
            )
        known = {(s.task, s.measure, s.variant) for s in baseline.scores}
        check(
            any((s.task, s.measure, s.variant) in known for s in results.scores),
            "--baseline: it has none of these tasks; evaluate the baseline with the same suite",
        )
        differences = {
            n: paired_difference(results, baseline, s)
            for n, s in enumerate(results.scores)
            if (s.task, s.measure, s.variant) in known
        }
    for line in table(results.scores, differences):
        say(console, line)
    for note in _notes(results.about)[1:]:
        warn(console, note)
    counts = results.about["counts"]
    if counts.get("slots"):
        say(console, f"{counts['tokens'] / counts['slots']:.0%} of the tokens computed for log-likelihoods were real")


class Meter:
    """Prints what is done, and the time left, every few seconds."""

    SECONDS = 10.0

    def __init__(self, console: Console):
        self._console, self._what, self._begun, self._next, self._first = console, "", 0.0, 0.0, 0

    def __call__(self, what: str, done: int, of: int):
        now = time.monotonic()
        if what != self._what:
            # The first batch was compiled, and says nothing of the speed.
            self._what, self._begun, self._first, self._next = what, now, done, now + self.SECONDS
        elif now >= self._next:
            self._next = now + self.SECONDS
            left = (now - self._begun) / max(1, done - self._first) * (of - done)
            say(self._console, f"{done:,} of {of:,} {what}, {duration_text(left)} left")
