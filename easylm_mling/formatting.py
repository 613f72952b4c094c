"""Format token counts and durations for people."""


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
