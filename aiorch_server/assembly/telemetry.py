"""What watches models and requests: the metrics that models declare, the log of slow requests, traces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from aiorch_server.config.server import ServerConfig, TraceConfig
from aiorch_server.errors import InvalidSettings
from aiorch_server.observability.model_metrics import ModelMetrics
from aiorch_server.observability.slow_log import SlowLog
from aiorch_server.observability.trace_settings import TraceLevel, TraceSetting, TraceSettings
from aiorch_server.observability.tracer import Tracer

if TYPE_CHECKING:
    from aiorch_server.lifecycle.servable import Servable
    from aiorch_server.observability.spans import OtlpWriter


class Telemetry:
    """All that watches one server; ``list_servables`` is asked from ``start`` on.

    Raises InvalidSettings where traces are to be sent and what sends them is not installed.
    """

    def __init__(self, config: ServerConfig, list_servables: Callable[[], Iterable[Servable]]) -> None:
        self.model_metrics = ModelMetrics()
        self.slow_log = SlowLog(list_servables, config.log.slow_us, config.log.slow_lines_per_s)
        self.trace_settings = TraceSettings()
        self._writer: OtlpWriter | None = None
        if config.trace.endpoint:
            self.trace_settings, self._writer = _open_traces(config.trace)
        self.tracer = Tracer(self.trace_settings, self._writer, self.slow_log)

    def prepare(self, servable: Servable) -> None:
        """Has a model version's requests watched, before it serves."""
        self.tracer.prepare(servable)
        self.slow_log.prepare(servable)

    async def close(self) -> None:
        """Sends the spans that are left."""
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close)


def _open_traces(config: TraceConfig) -> tuple[TraceSettings, OtlpWriter]:
    """The SDK is imported only where there is an endpoint; InvalidSettings where it is not installed."""
    try:
        from aiorch_server.observability.spans import OtlpWriter
    except ImportError as error:
        raise InvalidSettings(
            f"trace.endpoint: traces need the extra 'otel' (pip install 'aiorchestrator[otel]'): {error}"
        ) from error
    levels = frozenset({TraceLevel.TIMESTAMPS}) if config.level.value == "timestamps" else frozenset()
    default = TraceSetting(levels, config.rate, config.count, mode="opentelemetry")
    settings = TraceSettings(default, levels=frozenset({TraceLevel.OFF, TraceLevel.TIMESTAMPS}))
    return settings, OtlpWriter(config.endpoint, config.service)
