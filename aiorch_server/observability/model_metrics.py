"""Metrics that models declare themselves; shown beside the server's own, under the names that the models give them."""

from __future__ import annotations

import re
import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

KINDS: Final = ("counter", "gauge", "histogram")
#: All models together; a label with a value per request would grow without end.
MAX_SERIES: Final = 10_000
MAX_TEXT_CHARACTERS: Final = 1024
_RESERVED: Final = ("nv_", "aiorch_", "process_", "python_")
_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*\Z")
_LABEL: Final = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*\Z")

_Labels = tuple[tuple[str, str], ...]


class Series:
    """One metric of a model; see ``backend.MetricSeries``. Thread-safe."""

    def __init__(self, kind: str, bounds: tuple[float, ...]) -> None:
        self.kind = kind
        self.bounds = bounds
        self._lock = threading.Lock()
        self._value = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def increment(self, by: float) -> None:
        """Adds; a counter takes no negative number."""
        if self.kind == "histogram":
            raise ValueError("a histogram is not incremented, it observes")
        if self.kind == "counter" and by < 0:
            raise ValueError(f"a counter only grows, it cannot be incremented by {by}")
        with self._lock:
            self._value += by

    def set(self, to: float) -> None:
        """Sets a gauge."""
        if self.kind != "gauge":
            raise ValueError(f"a {self.kind} cannot be set, only a gauge can")
        with self._lock:
            self._value = float(to)

    def observe(self, value: float) -> None:
        """Counts a value into its bucket."""
        if self.kind != "histogram":
            raise ValueError(f"a {self.kind} does not observe, only a histogram does")
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._value += value

    def value(self) -> float:
        """What it shows now."""
        if self.kind == "histogram":
            raise ValueError("a histogram has no single value")
        with self._lock:
            return self._value

    def read(self) -> tuple[float, list[int]]:
        """The value or sum, and the counts of the buckets."""
        with self._lock:
            return self._value, list(self._counts)


class _Family:
    def __init__(self, description: str, kind: str) -> None:
        self.description = description
        self.kind = kind
        self.series: weakref.WeakValueDictionary[_Labels, Series] = weakref.WeakValueDictionary()


class ModelMetrics:
    """The metrics of all models; a series is shown as long as its model holds it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: dict[str, _Family] = {}

    def declare(
        self, name: str, description: str, kind: str, labels: Mapping[str, str], buckets: Sequence[float] = ()
    ) -> Series:
        """The series of that name and labels; see ``backend.DeclareMetric``."""
        _check(name, description, kind, labels)
        bounds = tuple(float(bound) for bound in buckets)
        if kind == "histogram" and (not bounds or list(bounds) != sorted(set(bounds))):
            raise ValueError(f"metric '{name}': the buckets of a histogram are ascending upper bounds, got {bounds}")
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._families = {each: family for each, family in self._families.items() if len(family.series)}
            family = self._families.get(name) or _Family(description, kind)
            if family.kind != kind:
                raise ValueError(f"metric '{name}' is a {family.kind} already, it cannot be a {kind} too")
            series = family.series.get(key)
            if series is None:
                if sum(len(each.series) for each in self._families.values()) >= MAX_SERIES:
                    raise ValueError(f"metric '{name}': models have {MAX_SERIES} metrics already, more are not kept")
                series = Series(kind, bounds)
                family.series[key] = series
            elif series.bounds != bounds:
                raise ValueError(f"metric '{name}' has buckets {series.bounds} already")
            self._families[name] = family
            return series

    def collect(self) -> Iterator[Metric]:
        """What is declared now."""
        with self._lock:
            found = [(name, each, list(each.series.items())) for name, each in self._families.items()]
        for name, family, series in found:
            if series:
                yield _render(name, family, series)


def _render(name: str, family: _Family, series: Sequence[tuple[_Labels, Series]]) -> Metric:
    from prometheus_client.metrics_core import Metric  # here: models declare before anybody scrapes

    # The samples of a counter have the model's own name: the library's counters would append "_total".
    metric = Metric(name, family.description, family.kind)
    for labels, each in series:
        value, counts = each.read()
        if family.kind != "histogram":
            metric.add_sample(name, dict(labels), value)
            continue
        total = 0
        for bound, count in zip((*each.bounds, float("inf")), counts, strict=True):
            total += count
            shown = "+Inf" if bound == float("inf") else repr(bound)
            metric.add_sample(f"{name}_bucket", {**dict(labels), "le": shown}, total)
        metric.add_sample(f"{name}_sum", dict(labels), value)
        metric.add_sample(f"{name}_count", dict(labels), total)
    return metric


def _check(name: str, description: str, kind: str, labels: Mapping[str, str]) -> None:
    if kind not in KINDS:
        raise ValueError(f"metric '{name}' is of kind '{kind}', one of {', '.join(KINDS)} is right")
    if not _NAME.match(name) or len(name) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"'{name[:100]}' is no name for a metric: letters, digits, '_' and ':', no digit in front")
    if name.startswith(_RESERVED):
        raise ValueError(f"metric '{name}': names with {', '.join(_RESERVED)} in front are the server's own")
    for label, value in labels.items():
        if not _LABEL.match(label) or (kind == "histogram" and label == "le"):
            raise ValueError(f"metric '{name}': '{label[:100]}' is no name for a label")
        if not isinstance(value, str):
            raise ValueError(f"metric '{name}': label '{label}' is {value!r}, a string is right")
    if max(map(len, (description, *labels, *labels.values()))) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"metric '{name}': a text has more than {MAX_TEXT_CHARACTERS} characters")
