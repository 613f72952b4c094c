"""A table of what a run scored on tasks while it trained: before and after, by the lines of its metrics.jsonl."""

from pathlib import Path

from easylm_mling.monitoring.metrics import read_metrics

_MEASURES = {"bits_per_byte": "bits a byte", "centred_accuracy": "centred accuracy"}


def before_and_after(metrics_file: Path, step: int | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return heads and rows, a row for each of the suite's: its scores first, and last up to `step` (default: of all).

    There are no rows before two measurements. Bits a byte are those of right answers; of texts that are written there is no
    accuracy.
    """
    lines = read_metrics(metrics_file, "tasks") if metrics_file.is_file() else []
    lines = [line for line in lines if step is None or line["step"] <= step]
    if len(lines) < 2:
        return (), []
    shown = lines[0], lines[-1]
    heads = ("task", *(f"{name}, step {line['step']:,}" for name in _MEASURES.values() for line in shown))
    rows = [
        (row, *(_number(line["rows"].get(row, {}).get(key)) for key in _MEASURES for line in shown))
        for row in shown[0]["rows"]
    ]
    return heads, rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
