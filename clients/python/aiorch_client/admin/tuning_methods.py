"""Objectives, blocking."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from aiorch_client.admin import tuning_calls
from aiorch_client.admin.connection import AdminConnection
from aiorch_client.admin.tuning_types import Explanation, Objective, RecordedTraffic
from aiorch_client.errors import from_rpc_error


class TuningMethods(AdminConnection):
    """The calls of the service Tuning."""

    def get_objective(self, model: str, *, timeout_s: float | None = None) -> Objective:
        """What a model should keep to; NotFoundError where it has no objective."""
        return self._call(tuning_calls.get_objective(model), timeout_s)

    def set_objective(
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
        """Changes what is not None, 0 takes it away; RequestError where nothing is given."""
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
        return self._call(call, timeout_s)

    def explain(self, model: str, *, timeout_s: float | None = None) -> Explanation:
        """Why the knobs stand where they stand; NotFoundError where nothing of it is tuned there."""
        return self._call(tuning_calls.explain(model), timeout_s)

    def record_traffic(
        self, model: str, seconds: float, *, version: int = 0, timeout_s: float | None = None
    ) -> Iterator[RecordedTraffic]:
        """Requests of a model's ``version`` as they come, for so long (an hour at most); 0: the first that has a share.

        Gives something at once, when the recording has begun, then twice a second, empty where nothing came. It ends
        earlier with the iterator. NotFoundError; ClientError FAILED_PRECONDITION where it is being recorded already, or
        has no one queue. Needs the role deployer. ``timeout_s``: how long the server may be late.
        """
        self._check_open()
        request = tuning_calls.record_traffic(model, seconds, version)
        limit_s = seconds + (self._layer.timeout_s if timeout_s is None else timeout_s)
        call = self._find(tuning_calls.RECORD)(request, timeout=limit_s, metadata=self._metadata)
        try:
            for message in call:
                yield tuning_calls.decode_traffic(message)
        except grpc.RpcError as error:
            self._check_open()
            raise from_rpc_error(error) from error
        finally:
            call.cancel()
