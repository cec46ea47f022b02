"""Charts for HTML pages: SVG in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 340  # of a chart, in SVG units: readable when a phone shrinks it to 360 px
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 48  # margins


@dataclass(frozen=True)
class Line:
    """One line of a chart. colour: a CSS colour; dash: an SVG stroke-dasharray, "" for a solid line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: str = ""
    width: float = 2.0


def line_chart(
    lines: Sequence[Line],
    label: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] = (0.0, 1.0),
    log_y: bool = False,
    include: Sequence[float] = (),
) -> str:
    """Draw an SVG chart with its legend below.

    Values that are not finite (or, on a logarithmic axis, not positive) are left out.

    Args:
        label: the text alternative.
        include: values that the y axis must cover.
    """
    # The range of the axes.
    points = {line.name: _finite(line, log_y) for line in lines}
    values = [*include, *(y for line in points.values() for _, y in line)]
    ticks = _log_ticks(values) if log_y else _ticks(*_extent(values))
    low, high = (math.log(ticks[0]), math.log(ticks[-1])) if log_y else (ticks[0], ticks[-1])

    # From values to SVG coordinates.
    def at_x(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        position = ((math.log(y) if log_y else y) - low) / (high - low)
        return HEIGHT - BOTTOM - position * (HEIGHT - TOP - BOTTOM)

    # Grid lines and tick labels.
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(*x_range):
        parts.append(f'<text x="{at_x(tick):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g}</text>')
    # Axis labels.
    middle = (TOP + HEIGHT - BOTTOM) / 2
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{centre}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    # The lines themselves.
    for line in lines:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points[line.name])
        parts.append(f'<polyline points="{path}" {_stroke(line)}/>')
    return "".join(parts) + "</svg>" + legend(lines)


def legend(lines: Sequence[Line]) -> str:
    """An HTML list of the lines' names, each with its stroke."""
    key = '<svg viewBox="0 0 28 10" aria-hidden="true"><line x1="1" x2="27" y1="5" y2="5" {}/></svg>'
    entries = (f"<li>{key.format(_stroke(line))}{escape(line.name)}</li>" for line in lines)
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _stroke(line: Line) -> str:
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    return f'fill="none" stroke="{line.colour}" stroke-width="{line.width:g}" stroke-linejoin="round"{dash}'


def _finite(line: Line, positive: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y) and (y > 0 or not positive)]


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    # Equal values still need an axis of some length.
    apart = high - low > 1e-9 * max(abs(low), abs(high))
    return (low, high) if apart else (low, low + 1)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose [low, high]."""
    # The step is 1, 2 or 5 times a power of ten.
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5 of each decade (or whole decades, if many) that enclose the values."""
    # Candidates: 1, 2, 5 of each decade, or decades only.
    low, high = _extent(values or [1.0, 10.0])
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    # Cut off ticks beyond the values, but keep one on either side.
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    first = max((i for i, tick in enumerate(ticks) if tick <= low * 1.0001), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= high * 0.9999), default=len(ticks) - 1)
    return ticks[first : max(last, first + 1) + 1]
