"""``pb_utils.MetricFamily`` and its metrics, shown on the server's ``/metrics``."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from aiorch_backends.python.triton.failures import TritonModelException
from aiorch_server.backend import DeclareMetric, MetricSeries


class MetricKind(enum.IntEnum):
    """What a metric can do."""

    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2


class Metric:
    """One series; it is shown as long as this object lives."""

    def __init__(self, series: MetricSeries) -> None:
        self._series = series

    def increment(self, by: float) -> None:
        """Adds to a counter or gauge; TritonModelException for a histogram, and for a counter that would fall."""
        _translate(self._series.increment, by)

    def set(self, to: float) -> None:
        """Sets a gauge; TritonModelException for the others."""
        _translate(self._series.set, to)

    def observe(self, value: float) -> None:
        """Adds a value to a histogram; TritonModelException for the others."""
        _translate(self._series.observe, value)

    def value(self) -> float:
        """Of a counter or gauge; TritonModelException for a histogram."""
        return float(_translate(self._series.value))


class MetricFamily:
    """A name with its series; each model has a subclass of its own that knows its server."""

    COUNTER: ClassVar = MetricKind.COUNTER
    GAUGE: ClassVar = MetricKind.GAUGE
    HISTOGRAM: ClassVar = MetricKind.HISTOGRAM

    _declare: ClassVar[DeclareMetric | None] = None

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        if type(self)._declare is None:
            raise TritonModelException("Metrics cannot be declared here: this backend runs without a server.")
        self._name, self._description, self._kind = name, description, MetricKind(kind)

    def Metric(self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None) -> Metric:
        """The series with these labels; ``buckets`` are upper bounds, for histograms only."""
        if (buckets is not None) != (self._kind is MetricKind.HISTOGRAM):
            raise TritonModelException(f"metric family '{self._name}': buckets are for histograms, and only for those")
        declare = type(self)._declare
        assert declare is not None
        series = _translate(
            declare, self._name, self._description, self._kind.name.lower(), dict(labels or {}), tuple(buckets or ())
        )
        return Metric(series)


def _translate(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        raise TritonModelException(str(error)) from None
