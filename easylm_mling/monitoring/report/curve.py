"""A curve of any length, kept in bounded memory."""

from dataclasses import dataclass, field

from easylm_mling.charts import Point


@dataclass
class _Part:
    """What is kept of `count` neighbouring points: the lowest and the highest, in the order of x."""

    count: int
    points: list[Point]

    def join(self, other: "_Part") -> "_Part":
        points = self.points + other.points
        low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
        return _Part(self.count + other.count, [low] if low == high else sorted((low, high)))


@dataclass
class Curve:
    """Takes points in the order of x and keeps at most `limit` of them, every peak and valley among them."""

    limit: int = 2000
    _parts: list[_Part] = field(default_factory=list)
    _points_per_part: int = 1

    def add(self, x: float, y: object):
        """Add a point, unless `y` is no number. Points from `x` on go: their steps are being done again."""
        if not isinstance(y, (int, float)):
            return
        self.cut(x)
        point = _Part(1, [(x, float(y))])
        if self._parts and self._parts[-1].count < self._points_per_part:
            self._parts[-1] = self._parts[-1].join(point)
        else:
            self._parts.append(point)
        if len(self._parts) > self.limit // 2:
            self._points_per_part *= 2
            parts = self._parts
            self._parts = [a.join(b) for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) & ~1 :]

    def cut(self, x: float):
        """Forget the points from `x` on."""
        while self._parts and self._parts[-1].points[-1][0] >= x:
            kept = [p for p in self._parts[-1].points if p[0] < x]
            if kept:
                self._parts[-1].points = kept
                return
            self._parts.pop()

    @property
    def points(self) -> list[Point]:
        """The points that are kept, in the order of x."""
        return [p for part in self._parts for p in part.points]
