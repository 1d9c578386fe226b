"""Many curves as one line with a band around it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

Curve = Sequence[tuple[float, float]]


def band(curves: Sequence[Curve], n: int = 120) -> tuple[list[float], list[float], list[float], list[float]]:
    """Median and 10-90 % band of step functions, on a logarithmic grid of the abscissa.

    A curve that has ended keeps its last value. The grid goes from the first positive abscissa of any curve to the last
    of any.

    Args:
        curves: of points (abscissa, value), abscissae increasing.
        n: number of points of the grid.

    Returns:
        The grid, and the three values at each of its points.

    >>> grid, low, middle, high = band([[(0, 1.0), (10, 0.5)], [(0, 2.0), (1000, 0.1)]], n=3)
    >>> [round(t) for t in grid], [round(t, 2) for t in middle]
    ([10, 100, 1000], [1.25, 1.25, 0.3])
    """
    first = min(next(x for x, _ in curve if x > 0) for curve in curves)
    last = max(curve[-1][0] for curve in curves)
    grid = [first * (last / first) ** (i / (n - 1)) for i in range(n)]
    xs = [[x for x, _ in curve] for curve in curves]
    columns = [
        sorted(curve[bisect_right(x, point * (1 + 1e-9)) - 1][1] for curve, x in zip(curves, xs, strict=True))
        for point in grid
    ]
    low, middle, high = ([quantile(column, q) for column in columns] for q in (0.1, 0.5, 0.9))
    return grid, low, middle, high


def quantile(values: Sequence[float], q: float) -> float:
    """Of sorted values, interpolated."""
    at = q * (len(values) - 1)
    i = min(int(at), len(values) - 2) if len(values) > 1 else 0
    return values[0] if len(values) == 1 else values[i] + (at - i) * (values[i + 1] - values[i])


def spread(values: Sequence[float], form: str) -> str:
    """Median with smallest and largest, for numbers that may be negative.

    >>> spread([-0.2, -0.1, 0.1], "+.1f"), spread([], ".1f")
    ('-0.1 (-0.2 to +0.1)', '-')
    """
    if not values:
        return "-"
    low, middle, high = (f"{quantile(sorted(values), q):{form}}" for q in (0.0, 0.5, 1.0))
    return middle if low == high else f"{middle} ({low} to {high})"


def draw(axis: Any, curves: Sequence[Curve], color: str, label: str, style: str = "-") -> None:
    """Add the median and the band to the axes of a figure."""
    if curves:
        grid, low, middle, high = band(curves)
        axis.plot(grid, middle, style, color=color, label=label, lw=1.6)
        axis.fill_between(grid, low, high, color=color, alpha=0.15, lw=0)
