"""Deployments, rollouts and events, blocking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import grpc

from aiorch_client.admin import deployment_calls
from aiorch_client.admin.connection import AdminConnection
from aiorch_client.admin.deployment_types import Deployment, Event, Rollout, RolloutPlan, TrafficTarget
from aiorch_client.admin.follow import LOOK_S, ONLY_NEW, PATIENCE_S, WATCH, Watch, wait_deployment, wait_rollout
from aiorch_client.errors import ClientError, from_rpc_error


class DeploymentMethods(AdminConnection):
    """The calls of the service Deployments."""

    def deploy(
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
        """Serves a version (by number or alias; neither: the latest), the first one at once, further ones by ``plan``.

        Returns when that is written down: ``wait`` and ``wait_ready`` tell how it goes. UnavailableError (ABORTED)
        where ``expected_generation`` is given and the deployment has another one by now.
        """
        call = deployment_calls.deploy(model, version, alias, plan, instances, is_on_demand, expected_generation)
        return self._call(call, timeout_s)

    def undeploy(self, model: str, *, timeout_s: float | None = None) -> None:
        """Takes all versions out of service, drained."""
        self._call(deployment_calls.undeploy(model), timeout_s)

    def get_deployment(self, model: str, *, timeout_s: float | None = None) -> Deployment:
        """One deployment; NotFoundError."""
        return self._call(deployment_calls.get_deployment(model), timeout_s)

    def list_deployments(self, *, timeout_s: float | None = None) -> Iterator[Deployment]:
        """All deployments, by model."""
        return self._list(deployment_calls.list_deployments(), timeout_s)

    def scale(
        self, model: str, instances: int, *, expected_generation: int = 0, timeout_s: float | None = None
    ) -> Deployment:
        """Changes the number of instances per server; 0: as the model's configuration says."""
        return self._call(deployment_calls.scale(model, instances, expected_generation), timeout_s)

    def set_traffic(
        self,
        model: str,
        traffic: Iterable[TrafficTarget],
        *,
        expected_generation: int = 0,
        timeout_s: float | None = None,
    ) -> Deployment:
        """Sets the shares by hand; they add up to 100."""
        return self._call(deployment_calls.set_traffic(model, traffic, expected_generation), timeout_s)

    def promote(self, model: str, *, timeout_s: float | None = None) -> Rollout:
        """Ends the rollout under way with the new version."""
        return self._call(deployment_calls.promote(model), timeout_s)

    def rollback(self, model: str, *, reason: str = "", timeout_s: float | None = None) -> Rollout:
        """Ends the rollout under way with the old version, or without one deploys the version that served before."""
        return self._call(deployment_calls.rollback(model, reason), timeout_s)

    def pause(self, model: str, *, reason: str = "", timeout_s: float | None = None) -> Rollout:
        """Stays at the present step until ``resume``; the gates are still watched."""
        return self._call(deployment_calls.pause(model, reason), timeout_s)

    def resume(self, model: str, *, timeout_s: float | None = None) -> Rollout:
        """Goes on with a rollout that was paused."""
        return self._call(deployment_calls.resume(model), timeout_s)

    def abort(self, model: str, *, reason: str = "", timeout_s: float | None = None) -> Rollout:
        """Ends a rollout with the old version, only one that is under way."""
        return self._call(deployment_calls.abort(model, reason), timeout_s)

    def get_rollout(self, id: str = "", *, model: str = "", timeout_s: float | None = None) -> Rollout:
        """A rollout by its id, or the newest of ``model``; NotFoundError."""
        return self._call(deployment_calls.get_rollout(id, model), timeout_s)

    def list_rollouts(self, model: str, *, timeout_s: float | None = None) -> Iterator[Rollout]:
        """Rollouts of a model, the newest first."""
        return self._list(deployment_calls.list_rollouts(model), timeout_s)

    def wait(
        self,
        rollout: Rollout | str,
        *,
        timeout_s: float = 3600.0,
        look_s: float = LOOK_S,
        on_look: Callable[[Rollout], object] | None = None,
    ) -> Rollout:
        """Waits until a rollout (or the one of that id) has ended, and returns it: its state says how, its reason why.

        Also returns one that goes on by a person alone, ``is_undecided``: it is paused, or compares without an end.
        ``on_look`` is called with it each ``look_s``. UnavailableError (DEADLINE_EXCEEDED) after ``timeout_s``; it goes
        on all the same.
        """
        id = rollout if isinstance(rollout, str) else rollout.id
        return self._run(wait_rollout(self._layer, id, timeout_s, look_s, on_look))

    def wait_ready(
        self,
        model: str,
        *,
        timeout_s: float = 600.0,
        look_s: float = LOOK_S,
        on_look: Callable[[Deployment], object] | None = None,
    ) -> Deployment:
        """Waits until all servers have done what is wanted of a model, or one says that a version does not serve.

        The deployment's state is READY or DEGRADED; or PROGRESSING where its rollout ``is_undecided``. UnavailableError
        (DEADLINE_EXCEEDED) after ``timeout_s``.
        """
        return self._run(wait_deployment(self._layer, model, timeout_s, look_s, on_look))

    def watch(self, model: str = "", *, after: int = ONLY_NEW, patience_s: float = PATIENCE_S) -> Iterator[Event]:
        """What happens to a model, or to all: from behind event ``after`` on, 0: from the oldest, -1: from now on.

        Goes on without end; connects anew where the connection is lost, behind the last event it has given, so that
        nothing is left out. Raises where the server refuses, or stays away for longer than ``patience_s``.
        """
        watch = Watch(self._layer, model, after, patience_s)
        while True:
            self._check_open()
            error: ClientError | None = None
            call = self._find(WATCH)(watch.request, metadata=self._metadata)
            try:
                watch.begin(call.initial_metadata())
                for message in call:
                    yield watch.take(message)
            except grpc.RpcError as rpc_error:
                self._check_open()
                error = from_rpc_error(rpc_error)
                error.__cause__ = rpc_error
            finally:
                call.cancel()
            self._closed.wait(watch.pause_s(error))
