"""Bars as SVG: one group per shape, one bar per server, logarithmic, because the servers are so far apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT = 760, 230, 90
_BAR, _GAP = 15, 8
_OURS, _OTHERS = "#0b7285", "#adb5bd"


@dataclass(frozen=True, slots=True)
class Bar:
    """One server at one shape."""

    group: str
    label: str
    value: float
    is_ours: bool


def draw_bars(title: str, bars: Sequence[Bar]) -> str:
    """A picture of its own with a title for those who cannot see it; values must be above 0."""
    least = 10 ** math.floor(math.log10(min(bar.value for bar in bars)))
    decades = max(1.0, math.log10(max(bar.value for bar in bars) / least))
    lines, y, group = [], 34, ""
    for bar in bars:
        if group and bar.group != group:
            y += _GAP
        group = bar.group
        width = max(1.0, (_WIDTH - _LEFT - _RIGHT) * math.log10(bar.value / least) / decades)
        label = escape(f"{bar.group}  {bar.label}")
        lines += [
            f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{label}</text>',
            f'<rect x="{_LEFT}" y="{y + 1}" width="{width:.0f}" height="{_BAR - 3}" '
            f'fill="{_OURS if bar.is_ours else _OTHERS}"/>',
            f'<text x="{_LEFT + width + 6:.0f}" y="{y + 12}">{format_value(bar.value)}</text>',
        ]
        y += _BAR
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 10}" role="img" '
            'font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{_WIDTH}" height="{y + 10}" fill="#ffffff"/>',
            f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(title)}</text>',
            *lines,
            "</svg>\n",
        ]
    )


def format_value(value: float) -> str:
    """Whole numbers, or one decimal below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
