"""Traces as OpenTelemetry's spans, sent to an OTLP receiver over HTTP; the only module that knows the SDK.

The SDK's own thread sends, from a bounded queue: what does not fit, or cannot be sent, is lost and nothing else.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from aiorch_server import __version__
from aiorch_server.errors import AiorchError
from aiorch_server.tracing import Incoming, Run

if TYPE_CHECKING:
    from opentelemetry.trace import Span

MAX_QUEUED_SPANS: Final = 4096
SEND_INTERVAL_MS: Final = 1000
SEND_TIMEOUT_S: Final = 5.0
_TRACES_PATH: Final = "/v1/traces"
#: Batches whose span may still get links to further members.
_MAX_BATCHES: Final = 64
#: The doorways of each phase.
_PHASES: Final = (
    ("queue", "enqueued_ns", "taken_ns"),
    ("compute_input", "gather_ns", "run_ns"),
    ("infer", "run_ns", "run_ended_ns"),
    ("compute_output", "run_ended_ns", "settled_ns"),
)
_MAX_TEXT: Final = 1000


class ServerSpan:
    """The span of one request at the server."""

    def __init__(self, span: Span) -> None:
        self.span = span
        context = span.get_span_context()
        self.trace_id = context.trace_id.to_bytes(16, "big")
        self.span_id = context.span_id.to_bytes(8, "big")


class OtlpWriter:
    """Makes and sends spans; all methods but ``close`` are for the event loop's thread and never wait."""

    def __init__(self, endpoint: str, service: str) -> None:
        self._processor = BatchSpanProcessor(
            OTLPSpanExporter(endpoint=_complete_endpoint(endpoint), timeout=SEND_TIMEOUT_S),
            max_queue_size=MAX_QUEUED_SPANS,
            schedule_delay_millis=SEND_INTERVAL_MS,
        )
        resource = Resource.create({"service.name": service, "service.version": __version__})
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("aiorch_server", __version__)
        self._propagator = TraceContextTextMapPropagator()
        # By model, version and when it was taken: the members of one batch come one by one.
        self._batches: OrderedDict[tuple[str, int, int], tuple[Span, int]] = OrderedDict()

    def begin(self, model: str, version: int, incoming: Incoming | None) -> ServerSpan:
        """The server's span of one request, a child of its caller's."""
        attributes = _describe_model(model, version)
        name, context = f"infer {model}", Context()
        if incoming is not None:
            name = incoming.method
            carrier = {"traceparent": incoming.parent, "tracestate": incoming.state}
            context = self._propagator.extract({key: value for key, value in carrier.items() if value}, Context())
            attributes |= _describe_call(incoming)
        return ServerSpan(self._tracer.start_span(name, context, SpanKind.SERVER, attributes))

    def finish(self, run: Run) -> None:
        """Makes the spans of the whole tree below the server's and ends that."""
        server: Span = run.span.span
        offset_ns = time.time_ns() - time.monotonic_ns()
        self._write_below(run, server, offset_ns)
        _end(server, run.error, 0)

    def close(self, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Sends what is there, within ``timeout_s``; blocks."""
        self._end_batches(0)
        self._provider.force_flush(int(timeout_s * 1000))
        self._provider.shutdown()

    def _write_run(self, run: Run, parent: Span, offset_ns: int) -> None:
        started_ns = run.started_ns + offset_ns
        context = trace.set_span_in_context(parent)
        attributes = _describe_model(run.model, run.version)
        span = self._tracer.start_span(f"infer {run.model}", context, attributes=attributes, start_time=started_ns)
        self._write_below(run, span, offset_ns)
        _end(span, run.error, (run.ended_ns or time.monotonic_ns()) + offset_ns)

    def _write_below(self, run: Run, span: Span, offset_ns: int) -> None:
        """What ``span``, which stands for ``run``, has: its answers as events, its phases and models as children."""
        self._write_phases(run, span, offset_ns)
        if run.cached is not None:
            started_ns, ended_ns, is_shared = run.cached
            context = trace.set_span_in_context(span)
            attributes: dict[str, bool | int] = {"aiorch.cache.shared": is_shared}
            hit = self._tracer.start_span(
                "cache_hit", context, attributes=attributes, start_time=started_ns + offset_ns
            )
            hit.end(ended_ns + offset_ns)
        for index, response in enumerate(run.responses):
            attributes = {"aiorch.response.index": index, "aiorch.response.is_error": response.is_error}
            span.add_event("response", attributes, response.at_ns + offset_ns)
        if run.n_responses:
            span.set_attribute("aiorch.responses", run.n_responses)
        for child in run.children:
            self._write_run(child, span, offset_ns)

    def _write_phases(self, run: Run, parent: Span, offset_ns: int) -> None:
        stamps, context = run.stamps, trace.set_span_in_context(parent)
        if not stamps.enqueued_ns:
            return
        batch = self._link_batch(run, parent, offset_ns) if stamps.batch_members > 1 else None
        for name, start, end in _PHASES:
            start_ns, end_ns = getattr(stamps, start), getattr(stamps, end)
            if name == "queue":
                end_ns = end_ns or stamps.settled_ns
            if not start_ns or not end_ns:
                continue
            links, attributes = [], {}
            if name == "infer":
                attributes = {"aiorch.batch.size": stamps.batch_rows, "aiorch.batch.members": stamps.batch_members}
                links = [Link(batch.get_span_context())] if batch is not None else []
            elif name == "queue" and stamps.free_ns:
                attributes = {"aiorch.batch_wait_us": (end_ns - stamps.free_ns) // 1000}
            span = self._tracer.start_span(
                name, context, attributes=attributes, links=links, start_time=start_ns + offset_ns
            )
            span.end(end_ns + offset_ns)

    def _link_batch(self, run: Run, member: Span, offset_ns: int) -> Span:
        """The span of the batch that ``run`` was in, in a trace of its own, with a link to this member."""
        stamps = run.stamps
        key = (run.model, run.version, stamps.taken_ns)
        found = self._batches.get(key)
        if found is not None:
            found[0].add_link(member.get_span_context())
            return found[0]
        attributes = _describe_model(run.model, run.version)
        attributes |= {"aiorch.batch.size": stamps.batch_rows, "aiorch.batch.members": stamps.batch_members}
        links = [Link(member.get_span_context())]
        span = self._tracer.start_span(
            f"batch {run.model}",
            Context(),
            attributes=attributes,
            links=links,
            start_time=stamps.gather_ns + offset_ns,
        )
        self._batches[key] = (span, stamps.settled_ns + offset_ns)
        self._end_batches(_MAX_BATCHES)
        return span

    def end_batches(self) -> None:
        """Ends the batches' spans: no more members are expected."""
        self._end_batches(0)

    def _end_batches(self, most: int) -> None:
        while len(self._batches) > most:
            _, (span, ended_ns) = self._batches.popitem(last=False)
            span.end(ended_ns)


def _complete_endpoint(endpoint: str) -> str:
    scheme, _, rest = endpoint.partition("://")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}/{path}" if path else f"{scheme}://{host}{_TRACES_PATH}"


def _describe_model(model: str, version: int) -> dict[str, Any]:
    return {"aiorch.model.name": model, "aiorch.model.version": version}


def _describe_call(incoming: Incoming) -> Mapping[str, str]:
    if incoming.protocol == "grpc":
        service, _, method = incoming.method.rpartition("/")
        return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
    method, _, path = incoming.method.partition(" ")
    return {"http.request.method": method, "url.path": path[:_MAX_TEXT]}


def _end(span: Span, error: BaseException | None, ended_ns: int) -> None:
    if error is not None:
        if isinstance(error, AiorchError):
            text = str(error)[:_MAX_TEXT]
            span.set_attribute("rpc.grpc.status_code", int(error.code))
        else:  # what nobody raised on purpose is not told outside, and so is not here
            text = "cancelled" if not isinstance(error, Exception) else "internal error"
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(Status(StatusCode.ERROR, text))
    span.end(ended_ns or None)
