"""What an offline search found: a document of plain values, and a page that needs nothing beside itself. Pure."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiorch_server.config.objective import Objective, format_duration
from aiorch_server.optimizer.predict import Knobs
from aiorch_server.optimizer.search import Found, Point

#: Of the document; grows when a field changes its meaning.
FORMAT: Final = 1
_WIDTH, _HEIGHT, _EDGE = 640, 320, 56
_COLOURS: Final = ("#1565c0", "#c62828", "#2e7d32", "#6a1b9a")
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid
#ddd}td:first-child,th:first-child{text-align:left}pre{background:#f4f4f4;padding:.8rem;overflow:auto}svg{max-width:100%}
"""
_PAGE: Final = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>'
    "<body>{body}"
    '<script type="application/json" id="document">{document}</script></body></html>\n'
)


def describe_knobs(knobs: Knobs) -> dict[str, int]:
    """By the names that decisions and configurations have."""
    return {"max_batch_size": knobs.max_rows, "delay_us": knobs.delay_us, "instances": knobs.instances}


def describe_found(found: Found) -> dict[str, Any]:
    """A setting and what is predicted of it; latencies in ms, shares from 0 to 1."""
    prediction = found.prediction
    return {
        **describe_knobs(found.knobs),
        "percentile_ms": round(prediction.percentile_ns / 1e6, 3),
        "percentile_error_ms": round(prediction.percentile_error_ns / 1e6, 3),
        "good": round(found.good, 4),
        "goodput": round(prediction.goodput, 2),
        "busy": round(prediction.busy, 4),
        "rows_per_batch": round(prediction.rows_per_batch, 2),
        "is_met": found.is_met,
    }


def describe_points(points: Sequence[Point]) -> list[dict[str, Any]]:
    """A frontier, by rising load."""
    return [{"rate": round(point.rate, 2), **describe_found(point.found)} for point in points]


def write_config(knobs: Knobs, objective: Objective) -> str:
    """Lines of a config.pbtxt that begin at that setting."""
    words = [f"p{objective.percentile:g}={format_duration(objective.latency_us)}"]
    if objective.error_budget:
        words.append(f"error_budget={objective.error_budget:g}")
    words.append(f"max_batch_size={knobs.max_rows}")
    if knobs.delay_us:
        words.append(f"max_delay={format_duration(knobs.delay_us)}")
    return (
        f'parameters {{ key: "objective" value {{ string_value: "{", ".join(words)}" }} }}\n'
        f"dynamic_batching {{ max_queue_delay_microseconds: {knobs.delay_us} }}\n"
        f"instance_group [ {{ count: {knobs.instances} kind: KIND_CPU }} ]\n"
    )


def write_page(document: Mapping[str, Any]) -> str:
    """The page; its plots are drawn here, it loads nothing, and it carries the document."""
    title = f"{document['model']}: {document['objective']}"
    chosen, more = document["chosen"], document["one_more_instance"]
    rate = document["traffic"]["rate"]
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(document['verdict'])}</p>",
        f"<p>{rate:g} requests/s, {document['traffic']['requests']} requests simulated; "
        f"the load can grow {chosen['growth']:g} times, with one more instance {more['growth']:g} times.</p>",
        "<h2>Predicted and verified</h2>",
        _tabulate(document["verified"]),
        "<h2>Latency by load</h2>",
        _plot(
            [
                ([(each["rate"], each["percentile_ms"]) for each in document["frontier"]],
                 f"{chosen['instances']} instance(s)"),
                ([(each["rate"], each["percentile_ms"]) for each in more["frontier"]],
                 f"{more['instances']} instances"),
            ],
            "requests/s", "ms at the percentile",
        ),
        _tabulate(document["frontier"]),
        "<h2>Run time by rows</h2>",
        _plot([([(each["rows"], each["ms"]) for each in document["curve"]], "1 instance")], "rows", "ms"),
        "<h2>Every setting that was tried</h2>",
        _tabulate(document["candidates"]),
        "<h2>To paste into config.pbtxt</h2>",
        f"<pre>{html.escape(document['config'])}</pre>",
    ]  # fmt: skip
    # an end tag in a text must not end the script
    stored = json.dumps(document, allow_nan=False).replace("<", "\\u003c")
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="".join(body), document=stored)


def _tabulate(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    names = list(rows[0])
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    lines = "".join("<tr>" + "".join(f"<td>{_write(row[name])}</td>" for name in names) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return html.escape("" if value is None else str(value))


def _plot(lines: Sequence[tuple[Sequence[tuple[float, float]], str]], across: str, up: str) -> str:
    points = [point for line, _ in lines for point in line]
    right = max((x for x, _ in points), default=1.0) or 1.0
    top = max((y for _, y in points), default=1.0) or 1.0
    inner_width, inner_height = _WIDTH - 2 * _EDGE, _HEIGHT - 2 * _EDGE

    def place(x: float, y: float) -> str:
        return f"{_EDGE + x / right * inner_width:.1f},{_HEIGHT - _EDGE - y / top * inner_height:.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{up} by {across}">']
    for part in (0.0, 0.5, 1.0):
        x, y = _EDGE + part * inner_width, _HEIGHT - _EDGE - part * inner_height
        parts.append(f'<line x1="{_EDGE}" x2="{_WIDTH - _EDGE}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{_EDGE - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{_round(top * part)}</text>'
        )
        below = f'x="{x:.1f}" y="{_HEIGHT - _EDGE + 16}" text-anchor="middle" font-size="11"'
        parts.append(f"<text {below}>{_round(right * part)}</text>")
    for number, (line, name) in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        drawn = " ".join(place(x, y) for x, y in line)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in line:
            at_x, at_y = place(x, y).split(",")
            parts.append(f'<circle cx="{at_x}" cy="{at_y}" r="3" fill="{colour}"><title>{x:g}: {y:g}</title></circle>')
        legend = f'x="{_EDGE + 8}" y="{_EDGE - 30 + 14 * number}" fill="{colour}" font-size="12"'
        parts.append(f"<text {legend}>{html.escape(name)}</text>")
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle" font-size="12">{across}</text>')
    parts.append(f'<text x="8" y="14" font-size="12">{up}</text></svg>')
    return "".join(parts)


def _round(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""
