"""The command `eval`: a model's scores on a suite, from the check of its tasks to the table."""

import random
import time
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console

from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import load_info, stored_model
from easylm_mling.config import ModelConfig, to_tree
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import check
from easylm_mling.evaluation.request_cache import RequestCache
from easylm_mling.evaluation.results import Results, Score, paired_difference, read_results, table, write_results
from easylm_mling.evaluation.scoring.suites import Suite, harness_is_there
from easylm_mling.formatting import duration_text
from easylm_mling.inference.generate import find_tokenizer, load_model
from easylm_mling.monitoring.console import say, warn
from easylm_mling.storage.object_store import is_bucket

_LONGEST = 8192  # tokens of a window, unless --max-length says more
_SEED = 1234  # of Python and numpy while prompts are built: the harness's own
_SAMPLED = 1 << 16  # bytes of a file of weights, at each of 16 places, that go into its digest


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated, on what, and where the results go."""

    model: str  # a run, an imported checkpoint or a Hugging Face directory
    suite: Suite
    step: int | None = None
    tokenizer: str | None = None
    output: str | None = None
    baseline: str | None = None
    dtype: str = "bfloat16"
    max_length: int | None = None
    limit: int | None = None  # items of each task

    @property
    def asked(self) -> list:
        """What decides the scores beside the model: rows and window."""
        return [[[r.name, r.task, r.shots, r.measure] for r in self.suite.rows], self.max_length]


def evaluate_model(options: EvalOptions, console: Console) -> Results:
    """Evaluate a model, print its table and write its results. Everything that can be checked is, before it is loaded.

    Raises ConfigError for what is wrong: tasks, data sets, the baseline, the tokenizer, a window the model does not have.
    """
    check(harness_is_there(), "eval: lm-evaluation-harness is missing; run pip install 'easylm-mling[eval]'")
    from easylm_mling.evaluation.harness import HarnessModel, Limits
    from easylm_mling.evaluation.scoring.scorer import Scorer
    from easylm_mling.evaluation.scoring.tasks import load_rows  # they import lm_eval

    baseline = read_results(options.baseline) if options.baseline else None
    tokenizer = Tokenizer(str(options.tokenizer or find_tokenizer(options.model, options.step)), "--tokenizer ")
    say(console, f"checking the tasks of {options.suite.name}")
    rows = load_rows(options.suite)
    graph, params, model = load_model(options.model, step=options.step)
    tokenizer.check_model(model)
    length = options.max_length or min(model.max_position_embeddings, _LONGEST)
    check(
        0 < length <= model.max_position_embeddings,
        f"--max-length {length}: the model reads 1 to {model.max_position_embeddings} tokens",
    )
    step, folder = _place(options)
    scorer = Scorer(graph, params, model, _mesh_of(params), options.dtype)
    name = _identity(options.model, step, model, tokenizer, options.dtype, length)
    cache = RequestCache(folder / f"requests-{name}.jsonl")
    if cache.restored:
        say(console, f"{cache.restored:,} answers of earlier evaluations are kept in {folder}")
    try:
        lm = HarnessModel(scorer, tokenizer, cache, Limits(length), _Meter(console))
        raw = _run(lm, rows, options.limit)
    finally:
        cache.close()
    scores = [score for row in rows for score in _scores(row, raw)]
    about = {
        "model": Path(options.model).name, "step": step, "suite": options.suite.name, "dtype": options.dtype,
        "window": length, "limit": options.limit, "form": "plain", "bos": lm.bos, "lm_eval": version("lm_eval"),
        "asked": options.asked, "weights": name, "counts": dict(lm.counts),
    }  # fmt: skip
    notes = _notes(about)
    results = write_results(folder, options.suite.name, about, scores, raw, notes)
    _show(console, results, baseline, notes, folder)
    return results


def _run(lm: Any, rows: list, limit: int | None) -> dict:
    from lm_eval.evaluator import evaluate

    tasks = {name: task for row in rows for name, task in row.tasks.items()}
    groups = {name: group for row in rows for name, group in row.groups.items()}
    random.seed(_SEED)
    np.random.seed(_SEED)
    raw: Any = evaluate(lm, {"tasks": tasks, "groups": groups}, limit=limit, bootstrap_iters=1000)
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
    notes = [
        f"lm-evaluation-harness {about['lm_eval']}, plain form (no chat template), "
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


def _show(console: Console, results: Results, baseline: Results | None, notes: list[str], folder: Path):
    differences = None
    if baseline:
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
    for note in notes[1:]:
        warn(console, note)
    counts = results.about["counts"]
    if counts.get("slots"):
        say(console, f"{counts['tokens'] / counts['slots']:.0%} of the tokens computed for log-likelihoods were real")
    say(console, f"written to {folder}")


class _Meter:
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


def _place(options: EvalOptions) -> tuple[int | None, Path]:
    """Return the step, and the folder of the results: RUN/evaluations/STEP, where the model card looks for them."""
    is_hf = (Path(options.model) / "config.json").is_file()
    step = None if is_hf else int(step_directory(options.model, options.step).name)
    if options.output:
        return step, Path(options.output)
    if is_hf or is_bucket(options.model):
        name = Path(options.model.rstrip("/")).name
        return step, Path("evaluations") / name / ("" if step is None else str(step))
    return step, Path(options.model) / "evaluations" / str(step)


def _identity(path: str, step: int | None, model: ModelConfig, tokenizer: Tokenizer, dtype: str, length: int) -> str:
    """Return a digest of all that answers depend on: weights, model, tokenizer, dtype and window."""
    digest = blake2b(digest_size=6)
    if step is None:
        for file in sorted(Path(path).glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as content:
                for n in range(16):
                    content.seek(max(0, size - _SAMPLED) * n // 15)
                    digest.update(content.read(_SAMPLED))
    else:
        info = load_info(path, step)
        digest.update(orjson.dumps([step, info.get("digests", {})], option=orjson.OPT_SORT_KEYS))
    rest = [to_tree(model), tokenizer.fingerprint, dtype, length]
    digest.update(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS, default=str))
    return digest.hexdigest()


def identity(options: EvalOptions) -> str:
    """Return the digest of all that the answers of a checkpoint depend on, without loading its parameters."""
    step = int(step_directory(options.model, options.step).name)
    tokenizer = Tokenizer(str(options.tokenizer or find_tokenizer(options.model, step)), "--tokenizer ")
    model = stored_model(options.model, step)
    length = options.max_length or min(model.max_position_embeddings, _LONGEST)
    return _identity(options.model, step, model, tokenizer, options.dtype, length)


def _mesh_of(params: dict) -> Any:
    return params["embed_tokens"].sharding.mesh
