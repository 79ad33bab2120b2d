"""Objectives, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio

from aiorch_client.admin import tuning_calls
from aiorch_client.admin.aio.connection import AsyncAdminConnection
from aiorch_client.admin.tuning_types import Explanation, Objective, RecordedTraffic
from aiorch_client.errors import from_rpc_error


class AsyncTuningMethods(AsyncAdminConnection):
    """The calls of the service Tuning."""

    async def get_objective(self, model: str, *, timeout_s: float | None = None) -> Objective:
        """As ``AdminClient.get_objective``."""
        return await self._call(tuning_calls.get_objective(model), timeout_s)

    async def set_objective(
        self,
        model: str,
        *,
        percentile: float | None = None,
        latency_us: int | None = None,
        error_budget: float | None = None,
        min_instances: int | None = None,
        max_instances: int | None = None,
        max_batch_size: int | None = None,
        priority: int | None = None,
        instance_cost: float | None = None,
        timeout_s: float | None = None,
    ) -> Objective:
        """As ``AdminClient.set_objective``."""
        call = tuning_calls.set_objective(
            model,
            percentile=percentile,
            latency_us=latency_us,
            error_budget=error_budget,
            min_instances=min_instances,
            max_instances=max_instances,
            max_batch_size=max_batch_size,
            priority=priority,
            instance_cost=instance_cost,
        )
        return await self._call(call, timeout_s)

    async def explain(self, model: str, *, timeout_s: float | None = None) -> Explanation:
        """As ``AdminClient.explain``."""
        return await self._call(tuning_calls.explain(model), timeout_s)

    async def record_traffic(
        self, model: str, seconds: float, *, version: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[RecordedTraffic]:
        """As ``AdminClient.record_traffic``."""
        self._ensure_open()
        request = tuning_calls.record_traffic(model, seconds, version)
        limit_s = seconds + (self._layer.timeout_s if timeout_s is None else timeout_s)
        call = self._find(tuning_calls.RECORD)(request, timeout=limit_s, metadata=self._metadata)
        try:
            while (message := await self._answer(call.read())) is not grpc.aio.EOF:
                yield tuning_calls.decode_traffic(message)
        except grpc.RpcError as error:
            self._ensure_open()
            raise from_rpc_error(error) from error
        finally:
            call.cancel()
