"""Writes aiorchestrator.json beside itself: the dashboard of models, their objectives and what tuners do about them.

``--check`` writes nothing, and fails where the file is not what would be written. Import the file into Grafana 10 or
newer; it asks for the data source.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(__file__).with_name("aiorchestrator.json")
SOURCE: Final = {"type": "prometheus", "uid": "${source}"}
#: Which servers and which of their versions a query is about.
OF: Final = 'instance=~"$server", model=~"$model", version=~"$version"'
SERVER: Final = 'instance=~"$server"'
BY: Final = "by (model, version)"
NAME: Final = "{{model}}:{{version}}"
_WIDTH: Final = 24
_HEIGHT: Final = 8


def rate(name: str, more: str = "") -> str:
    """Per second, of the chosen versions."""
    return f"rate({name}{{{OF}{more}}}[$__rate_interval])"


def quantile(part: float) -> str:
    """Of the time from a request's last byte to its answer's first."""
    buckets = rate("aiorch_request_phase_seconds_bucket", ', phase="total"')
    return f"histogram_quantile({part}, sum by (model, version, le) ({buckets}))"


def share(one: str, all_of_it: str, by: str = BY) -> str:
    """One rate over another; nothing where the other stands still."""
    return f"sum {by} ({one}) / (sum {by} ({all_of_it}) > 0)"


ENDS: Final = "aiorch_objective_requests_total"
IN_TIME: Final = ', end="in_time"'
LATE: Final = ', end="late"'
REFUSED: Final = ', end=~"refused|dropped|no_room"'
MISSED: Final = ', end=~"late|refused|dropped|no_room"'
#: Rows of panels: (title, unit, what it shows, queries as (expression, legend), width, more for Grafana).
ROWS: Final[tuple[tuple[str, tuple[tuple[Any, ...], ...]], ...]] = (
    (
        "Overview",
        (
            (
                "Requests",
                "reqps",
                "Requests by what became of them.",
                (
                    (f"sum {BY} ({rate('nv_inference_request_success')})", f"{NAME} answered"),
                    (
                        f"sum by (model, version, reason) ({rate('nv_inference_request_failure')}) > 0",
                        f"{NAME} {{{{reason}}}}",
                    ),
                ),
                8,
            ),
            (
                "Goodput",
                "reqps",
                "Answers within the target, beside all that was asked. Models without a target have none.",
                (
                    (f"sum {BY} ({rate(ENDS, IN_TIME)})", f"{NAME} in time"),
                    (f"sum {BY} ({rate(ENDS)})", f"{NAME} all"),
                ),
                8,
            ),
            (
                "Latency and its target",
                "s",
                "From a request's last byte to its answer's first. Buckets double, so percentiles are rough here; the"
                " objective's own percentile, below, is not.",
                (
                    (quantile(0.5), f"{NAME} p50"),
                    (quantile(0.99), f"{NAME} p99"),
                    (f"max {BY} (aiorch_objective_latency_seconds{{{OF}}} > 0)", f"{NAME} target"),
                ),
                8,
            ),
            (
                "Error budget in use",
                "percentunit",
                "The part of requests that missed the target, over the part that may: above 100 % the budget burns.",
                (
                    (
                        f"{share(rate(ENDS, MISSED), rate(ENDS))} / max {BY} (aiorch_objective_error_budget{{{OF}}})",
                        NAME,
                    ),
                ),
                8,
            ),
            (
                "Failures",
                "percentunit",
                "The part of requests that got no answer, overload included.",
                (
                    (
                        f"sum {BY} ({rate('nv_inference_request_failure')}) / (sum {BY}"
                        f" ({rate('nv_inference_request_success')}) + sum {BY} ({rate('nv_inference_request_failure')})"
                        " > 0)",
                        NAME,
                    ),
                ),
                8,
            ),
            (
                "Where time goes",
                "s",
                "The mean of each phase of a request.",
                (
                    (
                        share(
                            rate("aiorch_request_phase_seconds_sum", ', phase!="total"'),
                            rate("aiorch_request_phase_seconds_count", ', phase!="total"'),
                            "by (model, version, phase)",
                        ),
                        f"{NAME} {{{{phase}}}}",
                    ),
                ),
                8,
                {"stacking": {"mode": "normal"}, "fillOpacity": 30},
            ),
        ),
    ),
    (
        "Knobs and decisions",
        (
            (
                "Batch size",
                "short",
                "The most rows that a batch may have, and how many batches have in the mean.",
                (
                    (f"max {BY} (aiorch_tuner_max_batch_size{{{OF}}})", f"{NAME} knob"),
                    (share(rate("nv_inference_count"), rate("nv_inference_exec_count")), f"{NAME} mean"),
                ),
                8,
            ),
            (
                "Waiting for company",
                "s",
                "How long a request may wait for others with an instance free, and how long they do in the mean.",
                (
                    (f"max {BY} (aiorch_tuner_delay_seconds{{{OF}}})", f"{NAME} knob"),
                    (
                        share(
                            rate("aiorch_request_phase_seconds_sum", ', phase="batch_wait"'),
                            rate("aiorch_request_phase_seconds_count", ', phase="batch_wait"'),
                        ),
                        f"{NAME} mean",
                    ),
                ),
                8,
            ),
            (
                "Instances",
                "short",
                "Instances that take batches, over all chosen servers.",
                ((f"sum {BY} (aiorch_tuner_instances{{{OF}}})", NAME),),
                8,
            ),
            (
                "The objective's percentile",
                "s",
                "As measured over a second or so, and as it was foretold when a move was last looked for.",
                (
                    (f"max {BY} (aiorch_tuner_measured_latency_seconds{{{OF}}})", f"{NAME} measured"),
                    (f"max {BY} (aiorch_tuner_predicted_latency_seconds{{{OF}}})", f"{NAME} foretold"),
                    (f"max {BY} (aiorch_objective_latency_seconds{{{OF}}} > 0)", f"{NAME} target"),
                ),
                8,
            ),
            (
                "Decisions",
                "short",
                "Moves in the last five minutes by what became of them.",
                (
                    (
                        f"sum by (model, version, knob, outcome) (increase(aiorch_tuner_decisions_total{{{OF}}}[5m]))",
                        f"{NAME} {{{{knob}}}} {{{{outcome}}}}",
                    ),
                ),
                8,
            ),
            (
                "State",
                "short",
                "What the tuner waits for: 1 for the state that it is in.",
                ((f"max by (model, version, state) (aiorch_tuner_state{{{OF}}})", f"{NAME} {{{{state}}}}"),),
                8,
                {"lineInterpolation": "stepAfter", "stacking": {"mode": "normal"}, "fillOpacity": 40},
            ),
        ),
    ),
    (
        "Queue and overload",
        (
            (
                "Queue",
                "short",
                "Requests that wait now.",
                ((f"sum {BY} (nv_inference_pending_request_count{{{OF}}})", NAME),),
                8,
            ),
            (
                "Refused for lateness",
                "reqps",
                "Requests that could not have been answered in time: refused at the door, or dropped after they had"
                " waited. no_room: the queue was full.",
                (
                    (
                        f"sum by (model, version, end) ({rate(ENDS, REFUSED)})",
                        f"{NAME} {{{{end}}}}",
                    ),
                ),
                8,
            ),
            (
                "Answered late",
                "reqps",
                "Answers that came after the target.",
                ((f"sum {BY} ({rate(ENDS, LATE)})", NAME),),
                8,
            ),
            (
                "Processor",
                "percentunit",
                "The machine's use, and what the tuners' looks and decisions take of one core.",
                (
                    (f"max by (instance) (nv_cpu_utilization{{{SERVER}}})", "{{instance}}"),
                    (f"sum by (instance) ({rate('aiorch_tuner_cpu_seconds_total')})", "{{instance}} tuners"),
                ),
                8,
            ),
            (
                "Memory",
                "bytes",
                "What servers have in memory.",
                ((f"process_resident_memory_bytes{{{SERVER}}}", "{{instance}}"),),
                8,
            ),
            (
                "Connections",
                "short",
                "Open gRPC connections.",
                ((f"aiorch_grpc_connections{{{SERVER}}}", "{{instance}}"),),
                8,
            ),
        ),
    ),
)
#: Marks over all panels: (name, expression, colour, title, text).
MARKS: Final = (
    *(
        (
            f"{knob} moved",
            f"max {BY} (changes({series}{{{OF}}}[$__interval])) > 0",
            colour,
            f"{NAME} {knob}",
            "a tuner moved this knob; 'aiorch explain {{model}}' tells why",
        )
        for knob, series, colour in (
            ("batch size", "aiorch_tuner_max_batch_size", "blue"),
            ("delay", "aiorch_tuner_delay_seconds", "purple"),
            ("instances", "aiorch_tuner_instances", "green"),
        )
    ),
    (
        "undone",
        f'sum by (model, version, knob) (increase(aiorch_tuner_decisions_total{{{OF}, outcome!="kept"}}[$__interval]))'
        " > 0",
        "red",
        f"{NAME} {{{{knob}}}} undone",
        "a move did harm, or could not be made",
    ),
)


def build() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "title": "AIOrchestrator",
        "uid": "aiorchestrator",
        "tags": ["aiorchestrator", "inference"],
        "description": "Models, their objectives, and what tuners do about them. Written by write_dashboard.py.",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {},
        "annotations": {"list": [_mark(*each) for each in MARKS]},
        "templating": {
            "list": [
                {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}},
                _choice("server", "Server", "label_values(aiorch_build_info, instance)"),
                _choice("model", "Model", 'label_values(nv_inference_request_success{instance=~"$server"}, model)'),
                _choice("version", "Version", 'label_values(nv_inference_request_success{model=~"$model"}, version)'),
            ]
        },
        "panels": list(_lay_out()),
    }


def _lay_out() -> Iterator[dict[str, Any]]:
    number, x, y = 1, 0, 0
    for title, panels in ROWS:
        place = {"h": 1, "w": _WIDTH, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place}
        number, x, y = number + 1, 0, y + 1
        for panel in panels:
            width = panel[4]
            if x + width > _WIDTH:
                x, y = 0, y + _HEIGHT
            yield _panel(number, {"h": _HEIGHT, "w": width, "x": x, "y": y}, *panel)
            number, x = number + 1, x + width
        y += _HEIGHT


def _panel(
    number: int,
    place: dict[str, int],
    title: str,
    unit: str,
    description: str,
    queries: tuple[tuple[str, str], ...],
    _width: int,
    look: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"showPoints": "never", **(look or {})}}},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for place, (expression, legend) in enumerate(queries)
        ],
    }


def _mark(name: str, expression: str, colour: str, title: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "enable": True,
        "iconColor": colour,
        "datasource": SOURCE,
        "expr": expression,
        "step": "5s",
        "titleFormat": title,
        "textFormat": text,
    }


def _choice(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def render() -> str:
    """The file's text."""
    return json.dumps(build(), indent=2) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        FILE.write_text(render())
    elif FILE.read_text() != render():
        sys.exit(f"{FILE.name} is not what {Path(__file__).name} writes: run it")
