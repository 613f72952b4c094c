"""Format token counts, durations and tables for people."""

from collections.abc import Sequence


def tokens_text(n: float | None) -> str:
    """Format 1234567 as '1.23M', and None as '-'."""
    if n is None:
        return "-"
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= scale:
            return f"{n / scale:.3g}{letter}"
    return f"{n:.3g}"


def duration_text(seconds: float | None) -> str:
    """Format seconds as '2h 05m' or '3m 07s', and None as '-'."""
    if seconds is None:
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h {m:02}m" if hours else f"{m}m {s:02}s"


def markdown_table(heads: tuple[object, ...], rows: Sequence[tuple[object, ...]], rule: str = "---:") -> list[str]:
    """Make the lines of a Markdown table; `rule` aligns all columns but the first, by default to the right."""
    lines = [heads, ("---", *[rule] * (len(heads) - 1)), *rows]
    return ["| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines]
