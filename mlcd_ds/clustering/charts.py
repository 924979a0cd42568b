"""Charts as inline SVG: no script, no style sheet, nothing to load.

Shapes: b bars or bins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 30, 50
"""Margins of the plot inside the picture, pixels: room for the axes' numbers and titles."""
COLOURS = ("#1f5fa8", "#c2570c", "#3b7d3b")
MOST_LABELS = 16
"""More bars than this, and only every second, third ... is named."""


@dataclass(frozen=True)
class Series:
    """name: for the legend. values: one per bin."""

    name: str
    values: Sequence[float]


def bar_chart(names: Sequence[str], values: Sequence[float], x_title: str, y_title: str, hints: Sequence[str]) -> str:
    """A bar for each of `names`; hints: what is shown where the pointer rests on it."""
    top, ticks = _ticks(0, max(values, default=0))
    step = _plot_width() / max(1, len(values))
    every = math.ceil(len(names) / MOST_LABELS)
    parts = _axes(x_title, y_title, ticks, top)
    for i, (name, value, hint) in enumerate(zip(names, values, hints, strict=True)):
        x, height = LEFT + i * step, _height(value, top)
        parts.append(
            f'<rect x="{x + step * 0.08:.1f}" y="{_bottom() - height:.1f}" width="{step * 0.84:.1f}" height="{height:.1f}" '
            f'fill="{COLOURS[0]}"><title>{escape(hint)}</title></rect>'
        )
        if i % every == 0:
            parts.append(_text(x + step / 2, _bottom() + 16, name, "middle"))
    return _svg(parts, f"{y_title} by {x_title}")


def difference_chart(names: Sequence[str], values: Sequence[float], hints: Sequence[str], x_title: str) -> str:
    """A bar from zero to each value, one line a name, its number at its end; of the second colour where it is below zero."""
    row, left, right, top, bottom = 22, 14 + round(7.0 * max(map(len, names), default=0)), 60, 12, 46
    height = top + row * len(names) + bottom
    low, high = min(0.0, *values), max(0.0, *values)
    end, ticks = _ticks(low, high)
    begin, width = ticks[0], WIDTH - left - right
    label_room = 52 / width * (end - begin)  # a bar to the left has its number left of it
    if low < 0:
        begin = min(begin, low - label_room)

    def x_of(value: float) -> float:
        return left + (value - begin) / (end - begin) * width

    parts = []
    for tick in ticks:
        if tick >= begin:
            parts.append(_line(x_of(tick), top, x_of(tick), height - bottom, "#555" if tick == 0 else "#ddd"))
            parts.append(_text(x_of(tick), height - bottom + 16, f"{tick:+,.10g}" if tick else "0", "middle"))
    for i, (name, value, hint) in enumerate(zip(names, values, hints, strict=True)):
        y, start, stop = top + i * row, min(x_of(0), x_of(value)), max(x_of(0), x_of(value))
        parts.append(_text(left - 8, y + 15, name, "end"))
        parts.append(
            f'<rect x="{start:.1f}" y="{y + 3}" width="{stop - start:.1f}" height="{row - 6}" '
            f'fill="{COLOURS[value < 0]}"><title>{escape(hint)}</title></rect>'
        )
        at = (stop + 5, "start") if value >= 0 else (start - 5, "end")
        number = f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"
        parts.append(_text(at[0], y + 15, number, at[1]))
    parts.append(_text(left + width / 2, height - 8, x_title, "middle"))
    return _svg(parts, x_title, height)


def histogram(series: Sequence[Series], low: float, high: float, x_title: str, y_title: str) -> str:
    """Outlines of one or several histograms over low..high, all of the same bins; cut to where there is something.

    Values are shares; their axis is in per cent.
    """
    bins = len(series[0].values)
    used = [i for i in range(bins) if any(one.values[i] for one in series)] or [0, bins - 1]
    first, last = max(0, used[0] - 1), min(bins - 1, used[-1] + 1)
    width = (high - low) / bins
    x_low, x_high = low + first * width, low + (last + 1) * width
    top, ticks = _ticks(0, 100 * max(max(one.values) for one in series))
    parts = _axes(x_title, y_title, ticks, top)

    def x_of(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * _plot_width()

    for tick in _ticks(x_low, x_high)[1]:
        if x_low <= tick <= x_high:
            parts.append(_text(x_of(tick), _bottom() + 16, f"{tick:.10g}", "middle"))
            parts.append(_line(x_of(tick), _bottom(), x_of(tick), _bottom() + 4, "#555"))
    for one, colour in zip(series, COLOURS, strict=False):
        points = [f"{x_of(x_low):.1f},{_bottom():.1f}"]
        for i in range(first, last + 1):
            y = _bottom() - _height(100 * one.values[i], top)
            points += [f"{x_of(low + i * width):.1f},{y:.1f}", f"{x_of(low + (i + 1) * width):.1f},{y:.1f}"]
        points.append(f"{x_of(x_high):.1f},{_bottom():.1f}")
        parts.append(
            f'<polygon points="{" ".join(points)}" fill="{colour}" fill-opacity="0.22" stroke="{colour}" stroke-width="1.5">'
            f"<title>{escape(one.name)}</title></polygon>"
        )
    x = LEFT + 4
    for one, colour in zip(series, COLOURS, strict=False):
        parts.append(f'<rect x="{x}" y="6" width="12" height="12" fill="{colour}" fill-opacity="0.6"/>')
        parts.append(_text(x + 18, 16, one.name, "start"))
        x += 34 + round(7.2 * len(one.name))
    return _svg(parts, f"{y_title} by {x_title}: {', '.join(one.name for one in series)}")


def coarser(values: Sequence[float], factor: int) -> list[float]:
    """Sums of `factor` neighbouring bins."""
    return [sum(values[i : i + factor]) for i in range(0, len(values), factor)]


def _ticks(low: float, high: float) -> tuple[float, list[float]]:
    """(end of the axis, its round numbers): about five steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return last * step, [i * step for i in range(first, last + 1)]


def _plot_width() -> int:
    return WIDTH - LEFT - RIGHT


def _bottom() -> int:
    return HEIGHT - BOTTOM


def _height(value: float, top: float) -> float:
    return value / top * (HEIGHT - TOP - BOTTOM)


def _axes(x_title: str, y_title: str, ticks: Sequence[float], top: float) -> list[str]:
    parts = []
    for tick in ticks:
        y = _bottom() - _height(tick, top)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "#ddd"))
        parts.append(_text(LEFT - 6, y + 4, f"{tick:,.10g}", "end"))
    parts.append(_line(LEFT, _bottom(), WIDTH - RIGHT, _bottom(), "#555"))
    parts.append(_text(LEFT + _plot_width() / 2, HEIGHT - 8, x_title, "middle"))
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    parts.append(f'<text x="14" y="{middle:.1f}" text-anchor="middle" {turned}>{escape(y_title)}</text>')
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], label: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
