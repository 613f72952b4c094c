"""The picture in an exported model's card: the loss of each source over the run."""

from pathlib import Path

from easylm_mling.charts import Line, draw_lines, draw_png

LOSSES = "losses.png"


def plot_losses(path: Path, names: list[str], evaluations: list[dict], training: list[dict]) -> bool:
    """Draw held-out losses as marked lines, and behind them those of the training batches as faint ones.

    `evaluations` and `training` are lines of metrics.jsonl in order of steps. Returns False, and draws nothing, for fewer
    than two evaluations.
    """
    measured = [e for e in evaluations if e.get("loss") is not None]
    if len(measured) < 2:
        return False
    lines = []
    for i, name in enumerate(names):
        for entries, style in ((training, "faint"), (measured, "marked")):
            points = [(e["step"], e["sources"][name]) for e in entries if e.get("sources", {}).get(name) is not None]
            if points:
                lines.append(Line(name, points, i, style))
    with draw_png(path, 9, 4.5) as figure:
        axis = figure.subplots()
        draw_lines(axis, lines)
        axis.set_xlabel("step")
        axis.set_ylabel("loss (nats a token)")
        figure.legend(loc="outside right center", frameon=False)
    return True
