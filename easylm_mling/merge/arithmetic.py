"""The formulas of a merge on float32 arrays: computed in float64, rounded once to float32, and exact where nothing changes."""

from collections.abc import Sequence

import numpy as np

# mergekit's: nearly parallel tensors are mixed in a straight line.
_PARALLEL, _SMALL = 0.9995, 1e-8


def weighted_sum(weights: Sequence[float], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return sum w_i x_i, float32. One array of weight 1, and others of weight 0, is that array bit for bit."""
    terms = [(w, x) for w, x in zip(weights, arrays, strict=True) if w != 0]
    if not terms:
        return np.zeros_like(arrays[0])
    if [w for w, _ in terms] == [1.0]:
        return terms[0][1]
    (first, x), *others = terms
    total = np.multiply(x, first, dtype=np.float64)
    for weight, x in others:
        total += np.multiply(x, weight, dtype=np.float64)
    return _rounded(total)


def with_deltas(
    start: np.ndarray, base: np.ndarray, weights: Sequence[float], arrays: Sequence[np.ndarray]
) -> np.ndarray:
    """Return start + sum w_i (x_i - base), float32. Where the sum is 0 it is `start` bit for bit, minus zero too."""
    terms = [(w, x) for w, x in zip(weights, arrays, strict=True) if w != 0 and x is not base]
    one = next((i for i, (w, _) in enumerate(terms) if w == 1), None)
    if start is base and one is not None:
        # base + (x - base) is x, without the two roundings.
        start = terms.pop(one)[1]
    if not terms:
        return start
    total = np.zeros(start.shape, np.float64)
    for weight, x in terms:
        total += weight * np.subtract(x, base, dtype=np.float64)
    return np.where(total == 0, start, _rounded(total + start))


def slerp_factors(t: float, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the factors of `a` and `b`, flat float32, at `t` of the way between their directions (Shoemake 1985).

    Tensors that are nearly parallel are mixed in a straight line, as mergekit does.
    """
    dot, length_a, length_b = _products(a, b)
    cosine = dot / ((length_a if length_a > _SMALL else 1.0) * (length_b if length_b > _SMALL else 1.0))
    if t in (0.0, 1.0) or abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    angle = np.arccos(cosine)
    return float(np.sin((1.0 - t) * angle) / np.sin(angle)), float(np.sin(t * angle) / np.sin(angle))


def _products(a: np.ndarray, b: np.ndarray, block: int = 1 << 16) -> tuple[float, float, float]:
    """Return a.b, |a| and |b|, summed in float64 a block at a time."""
    sums = np.zeros(3)
    for start in range(0, a.size, block):
        x, y = (v[start : start + block].astype(np.float64) for v in (a, b))
        sums += x @ y, x @ x, y @ y
    return float(sums[0]), float(sums[1] ** 0.5), float(sums[2] ** 0.5)


def _rounded(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the caller refuses infinity
        return values.astype(np.float32)
