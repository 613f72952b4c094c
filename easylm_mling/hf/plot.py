"""The picture in an exported model's card: the loss of each source over the run."""

from pathlib import Path
from typing import Any

LOSSES = "losses.png"


def plot_losses(path: Path, names: list[str], evaluations: list[dict], training: list[dict]) -> bool:
    """Draw held-out losses as marked lines, those of the training batches behind them as faint ones; False if it cannot be.

    `evaluations` and `training` are lines of metrics.jsonl in order of steps.
    """
    measured = [e for e in evaluations if e.get("loss") is not None]
    if len(measured) < 2:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, name in enumerate(names):
        # Ten colours, then the same ones dashed.
        style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        faint: dict[str, Any] = style | {"alpha": 0.3, "linewidth": 1}
        marked: dict[str, Any] = style | {"marker": "o", "label": name}
        for lines, settings in ((training, faint), (measured, marked)):
            points = [(e["step"], e["sources"][name]) for e in lines if e.get("sources", {}).get(name) is not None]
            if points:
                steps, losses = zip(*points, strict=True)
                axis.plot(steps, losses, **settings)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats a token)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)
    return True
