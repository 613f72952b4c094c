"""What a search for weights has found: a table, a plot of the path, a sentence for the card, and the recipe."""

from pathlib import Path

import numpy as np

from easylm_mling.charts import Line, draw_lines, draw_png
from easylm_mling.config import to_tree
from easylm_mling.config.yaml12 import write_yaml
from easylm_mling.formatting import markdown_table
from easylm_mling.merge.search import DIGITS, Search, Tried, weights_text
from easylm_mling.storage.atomic import write_atomically


def write_search(folder: Path, search: Search, best: Tried, tried: list[Tried], written: Tried | None):
    """Write the table, the plot of the path, and the recipe with the chosen weights."""
    names = [m.text for m in search.recipe.models][-search.free :]
    rows = [
        (
            n,
            *(f"{w:.{DIGITS}f}" for w in t.weights),
            f"{t.choosing:.4f}",
            f"{t.reported:.4f}",
            "best" if t is best else "",
        )
        for n, t in enumerate(tried, 1)
    ]
    table = markdown_table(("", *names, "choosing half", "other half", ""), rows)
    per_source = markdown_table(
        ("other half, bits a byte", *best.sources),
        [(_role(t, best), *(f"{v:.4f}" for v in t.sources.values())) for t in _shown(search, best, tried)],
    )
    lines = ["# Search for weights", "", summary(search, best, written), "", *per_source, "", *table, ""]
    write_atomically(folder / "search.md", "\n".join(lines).encode())
    tree = to_tree(search.with_weights(best.weights))
    write_atomically(
        folder / "recipe.yaml", write_yaml({k: v for k, v in tree.items() if v not in (None, [])}).encode()
    )
    lowest = np.minimum.accumulate([t.choosing for t in tried]).tolist()
    with draw_png(folder / "search.png", 9, 4.5) as figure:
        axis = figure.subplots()
        numbers = range(1, len(tried) + 1)
        draw_lines(axis, [
            Line("choosing half", list(zip(numbers, (t.choosing for t in tried), strict=True)), 0, "marked"),
            Line("other half", list(zip(numbers, (t.reported for t in tried), strict=True)), 1, "marked"),
            Line("lowest so far", list(zip(numbers, lowest, strict=True)), 0, "faint"),
        ])  # fmt: skip
        axis.set_xlabel("evaluation")
        axis.set_ylabel("bits a byte")
        figure.legend(loc="outside right center", frameon=False)


def summary(search: Search, best: Tried, written: Tried | None) -> str:
    """Return a sentence for the card: by what the weights were chosen, and what they give."""
    as_written = f" ({written.reported:.4f} as written)" if written else ""
    return (
        f"the weights were chosen by {len(search.wishes)} sources' held-out text: {best.choosing:.4f} bits a byte on the half that "
        f"chose, {best.reported:.4f}{as_written} on the other"
    )


def _shown(search: Search, best: Tried, tried: list[Tried]) -> list[Tried]:
    return [best, *tried[: 2 + search.free]]


def _role(t: Tried, best: Tried) -> str:
    return f"weights {weights_text(t.weights)}" + (" (best)" if t is best else "")
