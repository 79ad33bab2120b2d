"""The server's counters as Prometheus metric families.

Names that begin with ``nv_`` are Triton's, because dashboards and alerts on them exist; they lack the ``_total`` that
Prometheus wants at the end of counters. ``aiorch_request_phase_seconds`` is a histogram whose buckets are the same in
every server, so it can be added up over machines.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aiorch_server import __version__
from aiorch_server._core import read_copied_bytes
from aiorch_server.observability.machine import MachineProbe
from aiorch_server.types import ModelStatistics, PhaseHistogram

logger = logging.getLogger(__name__)

Labels = tuple[tuple[str, str], ...]

#: Counters by name: what they count, and how to read them.
_COUNTERS: tuple[tuple[str, str, Callable[[ModelStatistics], float]], ...] = (
    (
        "nv_inference_request_success",
        "Number of successful inference requests, all batch sizes",
        lambda model: model.success.count,
    ),
    (
        "nv_inference_count",
        "Number of inferences performed (rows of all requests)",
        lambda model: model.inference_count,
    ),
    ("nv_inference_exec_count", "Number of model executions performed (batches)", lambda model: model.execution_count),
    (
        "nv_inference_request_duration_us",
        "Cumulative inference request duration in microseconds",
        lambda model: model.success.ns // 1000,
    ),
    (
        "nv_inference_queue_duration_us",
        "Cumulative inference queuing duration in microseconds",
        lambda model: model.queue.ns // 1000,
    ),
    (
        "nv_inference_compute_input_duration_us",
        "Cumulative compute input duration in microseconds",
        lambda model: model.compute_input.ns // 1000,
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Cumulative compute inference duration in microseconds",
        lambda model: model.compute_infer.ns // 1000,
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Cumulative compute output duration in microseconds",
        lambda model: model.compute_output.ns // 1000,
    ),
)
#: Those of models with a cache.
_CACHE_COUNTERS: tuple[tuple[str, str, Callable[[ModelStatistics], float]], ...] = (
    ("nv_cache_num_hits_per_model", "Number of cache hits per model", lambda model: model.cache_hit.count),
    ("nv_cache_num_misses_per_model", "Number of cache misses per model", lambda model: model.cache_miss.count),
    (
        "nv_cache_hit_duration_per_model",
        "Total cache hit duration per model, in microseconds",
        lambda model: model.cache_hit.ns // 1000,
    ),
    (
        "nv_cache_miss_duration_per_model",
        "Total cache miss duration per model, in microseconds",
        lambda model: model.cache_miss.ns // 1000,
    ),
)
_FAILURE = "nv_inference_request_failure"
#: All reasons are there from the start, so that a rate over the first failure is not lost.
_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_LATE = "aiorch_late_requests_total"
_PENDING = "nv_inference_pending_request_count"
_PHASES = "aiorch_request_phase_seconds"
_STALLED = "aiorch_stalled_streams_total"
_FIRST = "nv_inference_first_response_histogram_ms"
#: Names proposed for Triton (triton-inference-server/core, pull request 474), and the phases that they show.
_DURATIONS = (
    ("nv_inference_request_duration_histogram_us", "Duration of inference requests", "total"),
    ("nv_inference_queue_duration_histogram_us", "Time that inference requests waited in the queue", "wait"),
    ("nv_inference_compute_input_duration_histogram_us", "Time to gather the input of inference", "compute_input"),
    ("nv_inference_compute_infer_duration_histogram_us", "Time that the model took", "infer"),
    ("nv_inference_compute_output_duration_histogram_us", "Time to write the answers", "compute_output"),
)
_COPIED = "aiorch_copied_bytes_total"


class MeasuredModel(Protocol):
    """A live model version that can tell its numbers."""

    def statistics(self) -> ModelStatistics:
        """Counts since load."""
        ...

    def phase_histograms(self) -> Mapping[str, PhaseHistogram]:
        """Durations by phase: queue, batch_wait, compute_input, infer, compute_output, total."""
        ...


class DoorLedger(Protocol):
    """What a gRPC server counts over all its connections."""

    @property
    def bytes(self) -> int:
        """Held now: unfinished or unread messages and unsent answers."""
        ...

    @property
    def connections(self) -> int:
        """Open now."""
        ...

    @property
    def refused_messages(self) -> int:
        """Since the start, because too many bytes were held."""
        ...

    @property
    def refused_connections(self) -> int:
        """Since the start, because too many were open."""
        ...


class ModelCollector(Collector):
    """Families of all models that ``list_models`` gives at the time of a scrape.

    A model that cannot tell its numbers, because it is unloaded at that moment, is left out of that scrape. Two
    generations of one version (the old one draining after a reload) are added up.
    """

    def __init__(self, list_models: Callable[[], Iterable[MeasuredModel]]) -> None:
        self._list_models = list_models

    def collect(self) -> Iterator[Metric]:
        """One pass over the models, then their families."""
        counters: dict[str, dict[Labels, float]] = {name: {} for name, _, _ in (*_COUNTERS, *_CACHE_COUNTERS)}
        failures: dict[Labels, float] = {}
        late: dict[Labels, float] = {}
        pending: dict[Labels, float] = {}
        phases: dict[Labels, PhaseHistogram] = {}
        firsts: dict[Labels, PhaseHistogram] = {}
        stalled: dict[Labels, float] = {}
        durations: dict[str, dict[Labels, PhaseHistogram]] = {phase: {} for _, _, phase in _DURATIONS}
        for model in tuple(self._list_models()):
            try:
                statistics, histograms = model.statistics(), model.phase_histograms()
            except Exception:
                logger.warning("a model is missing in this scrape: it did not give its counters", exc_info=True)
                continue
            labels: Labels = (("model", statistics.name), ("version", statistics.version))
            for name, _, read in (*_COUNTERS, *(_CACHE_COUNTERS if statistics.has_cache else ())):
                _add(counters[name], labels, read(statistics))
            for reason in (*_REASONS, *sorted(statistics.failures.keys() - set(_REASONS))):
                _add(failures, (*labels, ("reason", reason)), statistics.failures.get(reason, 0))
            if statistics.refused_late or statistics.dropped_late:  # few models have an objective
                _add(late, (*labels, ("where", "door")), statistics.refused_late)
                _add(late, (*labels, ("where", "queue")), statistics.dropped_late)
            _add(pending, labels, statistics.pending)
            if (first := statistics.first_response) is not None:
                _add(stalled, labels, statistics.stalled)
                firsts[labels] = _sum_histograms(firsts[labels], first) if labels in firsts else first
            for phase, histogram in histograms.items():
                if phase in durations:
                    former = durations[phase].get(labels)
                    durations[phase][labels] = histogram if former is None else _sum_histograms(former, histogram)
                if phase == "wait":  # the sum of two others
                    continue
                key = (*labels, ("phase", phase))
                phases[key] = _sum_histograms(phases[key], histogram) if key in phases else histogram
        for name, documentation, _ in (*_COUNTERS, *(each for each in _CACHE_COUNTERS if counters[each[0]])):
            yield _family(name, documentation, "counter", counters[name])
        yield _family(_FAILURE, "Number of failed inference requests by reason", "counter", failures)
        if late:
            yield _family(_LATE, "Requests refused because no answer could have been in time", "counter", late)
        yield _family(_PENDING, "Number of requests that wait for execution now", "gauge", pending)
        yield _histogram_family(phases)
        for name, documentation, phase in _DURATIONS:
            yield _scaled_family(name, documentation, durations[phase], 1e6)
        if firsts:
            yield _first_response_family(firsts)
            yield _family(_STALLED, "Streams ended because nobody took their answers", "counter", stalled)


class DoorCollector(Collector):
    """What the gRPC doors that ``list_ledgers`` gives hold and refuse, added up."""

    def __init__(self, list_ledgers: Callable[[], Iterable[DoorLedger]]) -> None:
        self._list_ledgers = list_ledgers

    def collect(self) -> Iterator[Metric]:
        """No families where no door counts."""
        ledgers = tuple(self._list_ledgers())
        if not ledgers:
            return
        yield GaugeMetricFamily(
            "aiorch_grpc_connections", "Open gRPC connections", sum(ledger.connections for ledger in ledgers)
        )
        yield GaugeMetricFamily(
            "aiorch_grpc_buffered_bytes",
            "Bytes of messages and answers that gRPC connections hold",
            sum(ledger.bytes for ledger in ledgers),
        )
        yield CounterMetricFamily(
            "aiorch_grpc_refused_connections",
            "Connections closed at once because too many were open",
            sum(ledger.refused_connections for ledger in ledgers),
        )
        yield CounterMetricFamily(
            "aiorch_grpc_refused_messages",
            "Messages refused because too many bytes were held",
            sum(ledger.refused_messages for ledger in ledgers),
        )


class CopyCollector(Collector):
    """How many bytes of messages the server itself has copied; what the kernel and models copy is not in it."""

    def collect(self) -> Iterator[Metric]:
        """One counter by place."""
        values: dict[Labels, float] = {(("where", where),): size for where, size in read_copied_bytes().items()}
        yield _family(_COPIED, "Bytes of messages copied in user space by the server", "counter", values)


class MachineCollector(Collector):
    """The machine's gauges and what this build is."""

    def __init__(self, probe: MachineProbe | None = None) -> None:
        self._probe = probe or MachineProbe()

    def collect(self) -> Iterator[Metric]:
        """Gauges that can be read on this system."""
        utilization = self._probe.read_cpu_utilization()
        if utilization is not None:
            yield GaugeMetricFamily("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", utilization)
        memory = self._probe.read_memory_bytes()
        if memory is not None:
            total_bytes, used_bytes = memory
            yield GaugeMetricFamily("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", total_bytes)
            yield GaugeMetricFamily("nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", used_bytes)
        build = GaugeMetricFamily(
            "aiorch_build_info", "Version of the server; the value is always 1", labels=("version", "python")
        )
        build.add_metric((__version__, platform.python_version()), 1)
        yield build


def _add(values: dict[Labels, float], labels: Labels, value: float) -> None:
    values[labels] = values.get(labels, 0) + value


def _family(name: str, documentation: str, kind: str, values: Mapping[Labels, float]) -> Metric:
    # CounterMetricFamily would append "_total" to every sample; a plain Metric takes samples as they are.
    family = Metric(name, documentation, kind)
    for labels, value in values.items():
        family.add_sample(name, dict(labels), value)
    return family


def _histogram_family(phases: Mapping[Labels, PhaseHistogram]) -> Metric:
    family = Metric(_PHASES, "Time that requests spent in each phase", "histogram")
    for labels, histogram in phases.items():
        named = dict(labels)
        cumulative = 0
        for bound_s, count in zip((*histogram.bounds_s, float("inf")), histogram.counts, strict=True):
            cumulative += count
            family.add_sample(f"{_PHASES}_bucket", {**named, "le": _show_bound(bound_s)}, cumulative)
        family.add_sample(f"{_PHASES}_sum", named, histogram.sum_s)
        family.add_sample(f"{_PHASES}_count", named, cumulative)
    return family


def _first_response_family(firsts: Mapping[Labels, PhaseHistogram]) -> Metric:
    return _scaled_family(_FIRST, "Duration from request to first response in milliseconds", firsts, 1e3)


def _scaled_family(
    name: str, documentation: str, histograms: Mapping[Labels, PhaseHistogram], units_per_s: float
) -> Metric:
    family = Metric(name, documentation, "histogram")
    for labels, histogram in histograms.items():
        cumulative = 0
        for bound_s, count in zip((*histogram.bounds_s, float("inf")), histogram.counts, strict=True):
            cumulative += count
            bound = "+Inf" if bound_s == float("inf") else f"{bound_s * units_per_s:.12g}"
            family.add_sample(f"{name}_bucket", {**dict(labels), "le": bound}, cumulative)
        family.add_sample(f"{name}_sum", dict(labels), histogram.sum_s * units_per_s)
        family.add_sample(f"{name}_count", dict(labels), cumulative)
    return family


def _show_bound(bound_s: float) -> str:
    return "+Inf" if bound_s == float("inf") else repr(bound_s)


def _sum_histograms(one: PhaseHistogram, other: PhaseHistogram) -> PhaseHistogram:
    counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
    return PhaseHistogram(one.bounds_s, counts, one.sum_s + other.sum_s)
