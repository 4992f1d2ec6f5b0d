"""Line charts as SVG text, without a library and without a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Series", "draw", "short"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 240, 72, 20, 12, 26
_MOST_POINTS = 600
"""A screen shows no more; of each bucket the lowest and the highest are kept, so that no spike is lost."""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    """Iteration and value, in order; None or a value that is not finite is a gap."""
    is_dotted: bool = False
    """Show each point as a dot too, for values that are rare."""


@dataclass(frozen=True)
class _Frame:
    """Where values lie on the drawing."""

    low: tuple[float, float]
    high: tuple[float, float]
    marks: Sequence[float] = field(default=())

    def x(self, value: float) -> float:
        """Return the place of an iteration."""
        return _LEFT + (value - self.low[0]) / (self.high[0] - self.low[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Return the place of a value."""
        share = (value - self.low[1]) / (self.high[1] - self.low[1])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def draw(series: Sequence[Series], marks: Sequence[float] = (), shape: Callable[[float], str] = str) -> str:
    """Draw lines over iterations.

    Args:
        series: what to draw; the first is the main one.
        marks: iterations with a vertical line, such as where a run was resumed.
        shape: writes a value as text.

    Returns:
        An `<svg>` element, or a paragraph that says there is nothing to draw.
    """
    points = [(x, y) for one in series for x, y in one.points if y is not None and math.isfinite(y)]
    if not points:
        return '<p class="none">no values</p>'
    frame = _frame(points)
    parts = [*_grid(frame, shape), *_marks(frame, marks)]
    for number, one in enumerate(series):
        parts += _line(frame, one, number)
    label = escape(", ".join(one.name for one in series))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">' + "".join(parts) + "</svg>"
    )


def _frame(points: Sequence[tuple[float, float]]) -> _Frame:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return _Frame((min(xs), low - room), (max(*xs, min(xs) + 1), high + room))


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers between two values."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _grid(frame: _Frame, shape: Callable[[float], str]) -> Iterable[str]:
    for value in _ticks(frame.low[1], frame.high[1]):
        y = frame.y(value)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(shape(value))}</text>'
    for value in _ticks(frame.low[0], frame.high[0], 5):
        if value == int(value):
            x = frame.x(value)
            yield f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{int(value):,}</text>'


def _marks(frame: _Frame, marks: Sequence[float]) -> Iterable[str]:
    for mark in marks:
        if frame.low[0] <= mark <= frame.high[0]:
            yield f'<path class="mark" d="M{frame.x(mark):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'


def _line(frame: _Frame, series: Series, number: int) -> Iterable[str]:
    for stretch in _stretches(series.points):
        places = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in _thinned(stretch)]
        yield f'<path class="line s{number}" d="M{"L".join(places)}"/>'
        if series.is_dotted or len(places) == 1:
            for place in places:
                x, y = place.split()
                yield f'<circle class="dot s{number}" cx="{x}" cy="{y}" r="2.5"/>'


def _stretches(points: Sequence[Point]) -> Iterable[list[tuple[float, float]]]:
    """Yield the points between gaps."""
    stretch: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None and math.isfinite(y):
            stretch.append((x, y))
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept


def short(value: float) -> str:
    """Return a number in few signs: `12.5k`, `3.2M`, `6e-4`, `6.25`."""
    if 0 < abs(value) < 1e-3:
        number, exponent = f"{value:.3e}".split("e")
        return f"{float(number):g}e{int(exponent)}"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}"
