"""Small things for terminals: byte counts, sparklines, a line chart in Braille dots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
# Dot (column, row) of a Braille cell -> its bit.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def format_duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d} h"


def shorten(values: Sequence[float], count: int) -> list[float]:
    """At most `count` values, each the mean of its stretch."""
    if len(values) <= count:
        return list(values)
    edges = [index * len(values) // count for index in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def sparkline(values: Sequence[float], width: int = 40) -> str:
    points = shorten(values, width)
    if not points:
        return ""
    low, high = min(points), max(points)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in points)


def chart(values: Sequence[float], width: int = 60, height: int = 8) -> list[str]:
    """Lines of a chart, the largest value on top; the first and last line carry the scale."""
    if not values:
        return [""] * height
    columns, rows = width * 2, height * 4
    points = shorten(values, columns)
    low, high = min(points), max(points)
    scale = (rows - 1) / (high - low) if high > low else 0.0
    cells = [[0] * width for _ in range(height)]
    levels = [rows - 1 - round((value - low) * scale) for value in points]
    step = (columns - 1) / (len(levels) - 1) if len(levels) > 1 else 0.0
    last = levels[0]
    for column in range(columns if len(levels) > 1 else 1):
        position = column / step if step else 0.0
        left = min(int(position), len(levels) - 1)
        right = min(left + 1, len(levels) - 1)
        row = round(levels[left] + (levels[right] - levels[left]) * (position - left))
        # Steep stretches are drawn as lines, not as lonely dots.
        for dot in range(min(row, last + 1), max(row, last - 1) + 1):
            cells[dot // 4][column // 2] |= _DOTS[column % 2][dot % 4]
        last = row
    lines = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    labels = [""] * height
    labels[0], labels[-1] = f"{high:.3g}", f"{low:.3g}"
    margin = max(map(len, labels))
    return [f"{label:>{margin}} ┤{line}" for label, line in zip(labels, lines, strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the nearest ranks; nan without values."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
