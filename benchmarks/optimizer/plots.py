"""The comparison as pictures: good answers by load and policy, and one changing load second by second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from benchmarks.optimizer_figures import ENTRANTS, find_cells, find_share, list_points

Result = Mapping[str, Any]
_COLOURS: Final = {
    "auto": "#0b7285", "best": "#2f9e44", "none": "#adb5bd", "fixed": "#868e96", "aimd": "#e8590c", "linear": "#9c36b5",
}  # fmt: skip
_WIDTH: Final = 760
_BAR, _HEIGHT, _LEFT = 9, 150, 50


def draw_policies(result: Result) -> str:
    """Bars: the part of requests that was answered within the objective, by model, load and policy."""
    groups = list_points(result)
    columns = max(1, (_WIDTH - _LEFT) // (_BAR * len(ENTRANTS) + 24))
    rows = [groups[at : at + columns] for at in range(0, len(groups), columns)]
    lines, top = _draw_legend(ENTRANTS), 50
    for row in rows:
        for part in (0.0, 0.5, 1.0):
            y = top + _HEIGHT * (1 - part)
            lines.append(f'<line x1="{_LEFT}" y1="{y:.0f}" x2="{_WIDTH}" y2="{y:.0f}" stroke="#dee2e6"/>')
            lines.append(f'<text x="{_LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{part:.0%}</text>')
        for index, (workload, load) in enumerate(row):
            x = _LEFT + 10 + index * (_BAR * len(ENTRANTS) + 24)
            for place, entrant in enumerate(ENTRANTS):
                height = _HEIGHT * (find_share(result, workload, load, entrant) or 0.0)
                lines.append(
                    f'<rect x="{x + place * _BAR}" y="{top + _HEIGHT - height:.1f}" width="{_BAR - 1}" '
                    f'height="{height:.1f}" fill="{_COLOURS[entrant]}"/>'
                )
            middle = x + _BAR * len(ENTRANTS) / 2
            lines.append(f'<text x="{middle}" y="{top + _HEIGHT + 15}" text-anchor="middle">{escape(workload)}</text>')
            lines.append(f'<text x="{middle}" y="{top + _HEIGHT + 29}" text-anchor="middle">{escape(load)}</text>')
        top += _HEIGHT + 55
    return _frame("Part of requests answered within the objective", lines, top)


def draw_story(result: Result, workload: str, load: str) -> str:
    """Lines: offered and good requests/s of the tuner and of ``fixed``, and when which knob was moved."""
    chosen = {entrant: find_cells(result, workload, load, entrant)[:1] for entrant in ("auto", "fixed")}
    rows = {entrant: found[0] for entrant, found in chosen.items() if found}
    if "auto" not in rows:
        return ""
    ours = rows["auto"]
    length_s = ours["seconds"] / len(ours["segments_offered"])
    most = max(ours["segments_offered"]) / length_s or 1.0
    lines, bottom = _draw_legend(["auto", "fixed"]), 50 + _HEIGHT

    def place(at_s: float, rate: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - 20) * at_s / ours['seconds']:.1f},{bottom - _HEIGHT * rate / most:.1f}"

    def draw(counts: Sequence[int], colour: str, dashes: str = "") -> None:
        spots = " ".join(place((index + 0.5) * length_s, count / length_s) for index, count in enumerate(counts))
        lines.append(f'<polyline points="{spots}" fill="none" stroke="{colour}" stroke-dasharray="{dashes}"/>')

    draw(ours["segments_offered"], "#212529", "3 3")
    for entrant, row in rows.items():
        draw(row["segments_good"], _COLOURS[entrant])
    for index, decision in enumerate(each for each in ours["decisions"] if 0 <= each["at_s"] <= ours["seconds"]):
        x = place(decision["at_s"], 0).partition(",")[0]
        what = escape(f"{decision['knob']} {decision['before']:g} to {decision['after']:g}")
        lines.append(f'<line x1="{x}" y1="50" x2="{x}" y2="{bottom}" stroke="#f08c00"/>')
        lines.append(f'<text x="{x}" y="{bottom + 32 + 14 * (index % 4)}" text-anchor="middle">{what}</text>')
    lines.append(f'<text x="{_LEFT - 6}" y="54" text-anchor="end">{most:,.0f}</text>')
    lines.append(f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">0</text>')
    lines.append(f'<text x="{_WIDTH - 20}" y="{bottom + 15}" text-anchor="end">{ours["seconds"]:g} s</text>')
    return _frame(f"{workload}, {load}: requests/s offered (dashed) and answered in time", lines, bottom + 90)


def _draw_legend(entrants: Sequence[str]) -> list[str]:
    lines = []
    for index, entrant in enumerate(entrants):
        x = _LEFT + 80 * index
        lines.append(f'<rect x="{x}" y="28" width="10" height="10" fill="{_COLOURS[entrant]}"/>')
        lines.append(f'<text x="{x + 14}" y="37">{entrant}</text>')
    return lines


def _frame(title: str, lines: Sequence[str], height: float) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
            'font-family="sans-serif" font-size="11">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
            f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
            *lines,
            "</svg>\n",
        ]
    )
