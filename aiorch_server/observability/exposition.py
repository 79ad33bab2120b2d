"""Prometheus' text formats, with names exactly as the collectors give them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client import exposition
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector, CollectorRegistry

TEXT_TYPE = exposition.CONTENT_TYPE_PLAIN_0_0_4
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_OPENMETRICS_ACCEPTED = re.compile(r"(?:^|,)\s*application/openmetrics-text\s*(?:[;,]|$)", re.IGNORECASE)
#: The library writes ``_total`` behind the family name of each counter, also where no sample is called so.
_SUFFIXED_HEADER = re.compile(rb"^(# (?:HELP|TYPE) )([a-zA-Z0-9_:]+)_total ", re.MULTILINE)


class _Collected(Collector):
    """Families that are collected already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class _OpenMetricsView(Collector):
    """OpenMetrics reserves the type counter for names with ``_total``: Triton's names go out as type unknown."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if _is_bare(family):
                renamed = Metric(family.name, family.documentation, "unknown", family.unit)
                renamed.samples = family.samples
                yield renamed
            else:
                yield family


def render_metrics(registry: CollectorRegistry, accept: str | None) -> tuple[bytes, str]:
    """The metrics in the format that the ``Accept`` header asks for (text 0.0.4 by default), and its content type."""
    if accept is not None and _OPENMETRICS_ACCEPTED.search(accept):
        text: bytes = openmetrics.generate_latest(_OpenMetricsView(registry))  # type: ignore[no-untyped-call]
        return text, OPENMETRICS_TYPE
    families = list(registry.collect())
    bare = {family.name.encode() for family in families if _is_bare(family)}
    text = exposition.generate_latest(_Collected(families))
    return _SUFFIXED_HEADER.sub(lambda found: _strip(found, bare), text), TEXT_TYPE


def _is_bare(family: Metric) -> bool:
    """A counter whose samples have the family's own name; one without samples counts as such if it is Triton's."""
    if family.type != "counter":
        return False
    return family.name.startswith("nv_") or any(sample.name == family.name for sample in family.samples)


def _strip(found: re.Match[bytes], bare: set[bytes]) -> bytes:
    return found[1] + found[2] + b" " if found[2] in bare else found[0]
