"""Deployments, rollouts and events, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import grpc
import grpc.aio

from aiorch_client.admin import deployment_calls
from aiorch_client.admin.aio.connection import AsyncAdminConnection
from aiorch_client.admin.deployment_types import Deployment, Event, Rollout, RolloutPlan, TrafficTarget
from aiorch_client.admin.follow import LOOK_S, ONLY_NEW, PATIENCE_S, WATCH, Watch, wait_deployment, wait_rollout
from aiorch_client.errors import ClientError, from_rpc_error


class AsyncDeploymentMethods(AsyncAdminConnection):
    """The calls of the service Deployments."""

    async def deploy(
        self,
        model: str,
        version: int = 0,
        *,
        alias: str = "",
        plan: RolloutPlan | None = None,
        instances: int = 0,
        is_on_demand: bool = False,
        expected_generation: int = 0,
        timeout_s: float | None = None,
    ) -> Deployment:
        """As ``AdminClient.deploy``."""
        call = deployment_calls.deploy(model, version, alias, plan, instances, is_on_demand, expected_generation)
        return await self._call(call, timeout_s)

    async def undeploy(self, model: str, *, timeout_s: float | None = None) -> None:
        """As ``AdminClient.undeploy``."""
        await self._call(deployment_calls.undeploy(model), timeout_s)

    async def get_deployment(self, model: str, *, timeout_s: float | None = None) -> Deployment:
        """As ``AdminClient.get_deployment``."""
        return await self._call(deployment_calls.get_deployment(model), timeout_s)

    def list_deployments(self, *, timeout_s: float | None = None) -> AsyncIterator[Deployment]:
        """As ``AdminClient.list_deployments``."""
        return self._list(deployment_calls.list_deployments(), timeout_s)

    async def scale(
        self, model: str, instances: int, *, expected_generation: int = 0, timeout_s: float | None = None
    ) -> Deployment:
        """As ``AdminClient.scale``."""
        return await self._call(deployment_calls.scale(model, instances, expected_generation), timeout_s)

    async def set_traffic(
        self,
        model: str,
        traffic: Iterable[TrafficTarget],
        *,
        expected_generation: int = 0,
        timeout_s: float | None = None,
    ) -> Deployment:
        """As ``AdminClient.set_traffic``."""
        return await self._call(deployment_calls.set_traffic(model, traffic, expected_generation), timeout_s)

    async def promote(self, model: str, *, timeout_s: float | None = None) -> Rollout:
        """As ``AdminClient.promote``."""
        return await self._call(deployment_calls.promote(model), timeout_s)

    async def rollback(self, model: str, *, reason: str = "", timeout_s: float | None = None) -> Rollout:
        """As ``AdminClient.rollback``."""
        return await self._call(deployment_calls.rollback(model, reason), timeout_s)

    async def pause(self, model: str, *, reason: str = "", timeout_s: float | None = None) -> Rollout:
        """As ``AdminClient.pause``."""
        return await self._call(deployment_calls.pause(model, reason), timeout_s)

    async def resume(self, model: str, *, timeout_s: float | None = None) -> Rollout:
        """As ``AdminClient.resume``."""
        return await self._call(deployment_calls.resume(model), timeout_s)

    async def abort(self, model: str, *, reason: str = "", timeout_s: float | None = None) -> Rollout:
        """As ``AdminClient.abort``."""
        return await self._call(deployment_calls.abort(model, reason), timeout_s)

    async def get_rollout(self, id: str = "", *, model: str = "", timeout_s: float | None = None) -> Rollout:
        """As ``AdminClient.get_rollout``."""
        return await self._call(deployment_calls.get_rollout(id, model), timeout_s)

    def list_rollouts(self, model: str, *, timeout_s: float | None = None) -> AsyncIterator[Rollout]:
        """As ``AdminClient.list_rollouts``."""
        return self._list(deployment_calls.list_rollouts(model), timeout_s)

    async def wait(
        self,
        rollout: Rollout | str,
        *,
        timeout_s: float = 3600.0,
        look_s: float = LOOK_S,
        on_look: Callable[[Rollout], object] | None = None,
    ) -> Rollout:
        """As ``AdminClient.wait``."""
        id = rollout if isinstance(rollout, str) else rollout.id
        return await self._run(wait_rollout(self._layer, id, timeout_s, look_s, on_look))

    async def wait_ready(
        self,
        model: str,
        *,
        timeout_s: float = 600.0,
        look_s: float = LOOK_S,
        on_look: Callable[[Deployment], object] | None = None,
    ) -> Deployment:
        """As ``AdminClient.wait_ready``."""
        return await self._run(wait_deployment(self._layer, model, timeout_s, look_s, on_look))

    async def watch(
        self, model: str = "", *, after: int = ONLY_NEW, patience_s: float = PATIENCE_S
    ) -> AsyncIterator[Event]:
        """As ``AdminClient.watch``."""
        watch = Watch(self._layer, model, after, patience_s)
        while True:
            self._ensure_open()
            error: ClientError | None = None
            call = self._find(WATCH)(watch.request, metadata=self._metadata)
            try:
                watch.begin(await self._answer(call.initial_metadata()))
                while (message := await self._answer(call.read())) is not grpc.aio.EOF:
                    yield watch.take(message)
            except grpc.RpcError as rpc_error:
                self._ensure_open()
                error = from_rpc_error(rpc_error)
                error.__cause__ = rpc_error
            finally:
                call.cancel()
            await asyncio.sleep(watch.pause_s(error))
