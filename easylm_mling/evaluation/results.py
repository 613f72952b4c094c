"""Results of an evaluation: JSON in the harness's own form, a table, every item, and differences from other results.

Source of the paired error: the standard error of the mean of each item's difference (Miller 2024, "Adding Error Bars to
Evals", section 4.2).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from easylm_mling.errors import ConfigError, check, check_format
from easylm_mling.storage.atomic import atomic_file, write_atomically
from easylm_mling.storage.jsonl import read_jsonl

FORMAT = 1
_SHOWN = ("task", "doc_id", "doc_hash", "prompt_hash", "target", "filtered_resps", "filter")


@dataclass(frozen=True)
class Score:
    """One measure of one row. `tasks` are the tasks whose items it is a mean of, `by_size` whether each item counts alike."""

    row: str
    task: str
    measure: str  # such as acc
    variant: str  # the harness's filter, often none
    value: float
    error: float | None
    version: str
    shots: str
    splits: str
    tasks: list[str]
    by_size: bool

    @property
    def name(self) -> str:
        """The measure as the table shows it."""
        return self.measure if self.variant == "none" else f"{self.measure} ({self.variant})"


@dataclass(frozen=True)
class Results:
    """What was measured of one model: its scores, and each item's measures by (task, filter, item)."""

    about: dict[str, Any]
    scores: list[Score]
    items: Path

    def values(self, score: Score) -> dict[str, dict[tuple, float]]:
        """Return for each task of a score the measure of every item, by (number, digest of the item)."""
        out: dict[str, dict[tuple, float]] = {task: {} for task in score.tasks}
        for item in read_jsonl(self.items):
            value = item.get("measures", {}).get(score.measure)
            if item["task"] in out and item["filter"] == score.variant and isinstance(value, (int, float)):
                out[item["task"]][(item["doc_id"], item["doc_hash"])] = float(value)
        return out


def write_results(folder: Path, suite: str, about: dict, scores: list[Score], raw: dict, notes: list[str]) -> Results:
    """Write results-SUITE.json, items-SUITE.jsonl and results-SUITE.md into `folder`; each appears whole.

    `raw` is what the harness returned; its samples become the items.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = raw.get("samples", {})
    results = Results(about, scores, folder / f"items-{suite}.jsonl")
    with atomic_file(results.items) as file:
        for line in _items(samples):
            file.write(json.dumps(line, ensure_ascii=False, default=str).encode(errors="backslashreplace") + b"\n")
    kept = {k: raw[k] for k in ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples") if k in raw}
    tree = {"format": FORMAT, "about": about, "scores": [vars(s) for s in scores], "notes": notes, **kept}
    text = json.dumps(tree, ensure_ascii=False, indent=1, default=str)
    write_atomically(folder / f"results-{suite}.json", text.encode(errors="backslashreplace"))
    page = "\n".join([f"# {suite}", "", *table(scores), "", *(f"- {note}" for note in notes), ""])
    write_atomically(folder / f"results-{suite}.md", page.encode())
    return results


def read_results(path: str | Path) -> Results:
    """Read the results in a results-SUITE.json. Raises ConfigError if they are none, or their items are missing."""
    file = Path(path)
    try:
        tree = orjson.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:150]
        raise ConfigError(
            f"{path}: no results can be read ({why}); name a results-SUITE.json that eval wrote"
        ) from None
    check(isinstance(tree, dict) and "scores" in tree, f"{path}: holds no results of ours; name a results-SUITE.json")
    check_format(path, "results file", tree.get("format"), FORMAT, "evaluate again")
    items = file.with_name(file.name.replace("results-", "items-", 1)).with_suffix(".jsonl")
    check(items.is_file(), f"{items}: is missing, and differences are taken item by item; keep it beside {file.name}")
    return Results(tree["about"], [Score(**s) for s in tree["scores"]], items)


def paired_difference(new: Results, old: Results, score: Score) -> tuple[float, float] | None:
    """Return the mean difference of a score's items, and its standard error; None if the score is no mean of items.

    Raises ConfigError where the two were not measured on the same items.
    """
    ours, theirs = new.values(score), old.values(score)
    parts, sizes = [], []
    for task in score.tasks:
        if ours[task].keys() != theirs[task].keys():
            raise ConfigError(
                f"--baseline: it has other items of {task} ({len(theirs[task])}, and {len(ours[task])} here); evaluate the "
                "baseline with the same suite, data and --limit"
            )
        if not ours[task]:
            return None
        parts.append(np.array([ours[task][key] - theirs[task][key] for key in ours[task]]))
        sizes.append(len(parts[-1]))
    means = np.array([np.mean(list(ours[task].values())) for task in score.tasks])
    weights = np.array(sizes if score.by_size else [1.0] * len(sizes), float)
    weights /= weights.sum()
    if not math.isclose(float(weights @ means), score.value, abs_tol=1e-9):
        return None
    if score.by_size:
        whole = np.concatenate(parts)
        return float(whole.mean()), _error(whole)
    return float(weights @ [p.mean() for p in parts]), math.sqrt(
        sum((w * _error(p)) ** 2 for w, p in zip(weights, parts, strict=True))
    )


def table(scores: list[Score], differences: dict[int, tuple[float, float] | None] | None = None) -> list[str]:
    """Return the lines of a Markdown table; `differences` from a baseline are by the number of the score."""
    heads = ["task", "version", "shots", "split", "measure", "score", "±"]
    heads += ["difference", "± paired"] if differences is not None else []
    rule = ["---", *["---:"] * (len(heads) - 1)]
    rows = [heads, rule]
    for number, s in enumerate(scores):
        row = [s.row, s.version, s.shots, s.splits, s.name, *_with_error(s)]
        if differences is not None:
            pair = differences.get(number)
            row += ["-", "-"] if pair is None else [f"{pair[0]:+.4f}", f"{pair[1]:.4f}"]
        rows.append(row)
    return _as_markdown(rows)


def forms_table(plain: list[Score], chat: list[Score]) -> list[str]:
    """Return the lines of a Markdown table with the scores of both forms of prompts in columns of their own."""
    in_chat = {(s.task, s.measure, s.variant): s for s in chat}
    lines = [["task", "version", "shots", "split", "measure", "plain", "±", "chat", "±"]]
    lines.append(["---", *["---:"] * 8])
    for s in plain:
        other = in_chat.get((s.task, s.measure, s.variant))
        cells = [_with_error(x) for x in (s, other)]
        lines.append([s.row, s.version, s.shots, s.splits, s.name, *cells[0], *cells[1]])
    return _as_markdown(lines)


def _with_error(score: Score | None) -> tuple[str, str]:
    if score is None:
        return "-", "-"
    return f"{score.value:.4f}", "-" if score.error is None else f"{score.error:.4f}"


def _as_markdown(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]


def _items(samples: dict[str, list[dict]]) -> Iterator[dict]:
    for task, items in samples.items():
        for item in items:
            shown = {k: item.get(k) for k in _SHOWN if k in item}
            yield {**shown, "task": task, "measures": {m: item.get(m) for m in item.get("metrics", ())}}


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
