"""What should run of each model, and the way from one version to the next."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.admin.v1 import deployments_pb2 as pb
from google.protobuf.field_mask_pb2 import FieldMask

from aiorch_server.deployments import service
from aiorch_server.deployments.rollout import Command
from aiorch_server.errors import NotFoundError
from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.convert_deployments import decode_traffic, encode_deployment, encode_event
from aiorch_server.frontends.admin.convert_rollouts import decode_plan, encode_rollout
from aiorch_server.frontends.admin.feed import EventFeed
from aiorch_server.frontends.admin.fields import InvalidField, show, within
from aiorch_server.frontends.admin.pages import encode_page
from aiorch_server.registry import deployments, models, rollouts
from aiorch_server.registry.names import check_model_name
from aiorch_server.registry.records import Deployment, ServerStatus
from aiorch_server.registry.servers import read_server_statuses

if TYPE_CHECKING:
    from aiorch_server.registry.session import Session

#: A server that was silent for so long does not count any more.
HEARD_S: Final = 30.0
#: Initial metadata of a watch: the number behind which it begins.
POSITION_KEY: Final = "aiorch-events-after"
#: Fields that a rollout has a say in.
_OF_ROLLOUTS: Final = ("rollout", "state", "reason")


class DeploymentsServicer:
    """The service Deployments; methods with a session are operations on the registry's database.

    ``allow_code``: versions that can run code of their authors' choice may be deployed here.
    """

    def __init__(self, feed: EventFeed, *, allow_code: bool) -> None:
        self._feed = feed
        self._allow_code = allow_code

    def Deploy(self, session: Session, request: Any, caller: Caller) -> pb.Deployment:
        """Begins to serve a version."""
        with within("plan"):
            plan = decode_plan(request.plan)
        service.deploy(
            session,
            request.model,
            actor=caller.name,
            version=request.version,
            alias=request.alias,
            plan=plan,
            instances=request.instances,
            expected_generation=request.expected_generation,
            is_on_demand=request.is_on_demand,
            allow_code=self._allow_code,
        )
        return _describe(session, request.model)

    def Undeploy(self, session: Session, request: Any, caller: Caller) -> pb.UndeployResponse:
        """Takes all versions out of service."""
        service.undeploy(session, request.model, actor=caller.name)
        return pb.UndeployResponse()

    def GetDeployment(self, session: Session, request: Any, caller: Caller) -> pb.Deployment:
        """What should run of a model, and what servers made of it."""
        return _describe(session, request.model)

    def ListDeployments(self, session: Session, request: Any, caller: Caller) -> pb.ListDeploymentsResponse:
        """A page of the deployments that the caller may see."""
        mask = _check_mask(request.read_mask)
        page = deployments.list_deployments(
            session, size=request.page_size, token=request.page_token, is_visible=caller.sees
        )  # fmt: skip
        wants_rollouts = not mask.paths or any(path.partition(".")[0] in _OF_ROLLOUTS for path in mask.paths)
        statuses = {
            model: tuple(found)
            for model, found in groupby(read_server_statuses(session, within_s=HEARD_S), lambda each: each.model)
        }

        def encode(deployment: Deployment) -> pb.Deployment:
            message = _encode(session, deployment, statuses.get(deployment.model, ()), wants_rollouts)
            if not mask.paths:
                return message
            masked = pb.Deployment()
            mask.MergeMessage(message, masked)
            return masked

        return encode_page(pb.ListDeploymentsResponse(), "deployments", page, encode)

    def Scale(self, session: Session, request: Any, caller: Caller) -> pb.Deployment:
        """Changes the number of instances."""
        service.scale(
            session,
            request.model,
            request.instances,
            actor=caller.name,
            expected_generation=request.expected_generation,
        )
        return _describe(session, request.model)

    def SetTraffic(self, session: Session, request: Any, caller: Caller) -> pb.Deployment:
        """Sets the shares by hand."""
        service.set_traffic(
            session,
            request.model,
            decode_traffic(request.traffic),
            actor=caller.name,
            expected_generation=request.expected_generation,
            allow_code=self._allow_code,
        )
        return _describe(session, request.model)

    def Promote(self, session: Session, request: Any, caller: Caller) -> pb.Rollout:
        """Ends a rollout with the new version."""
        return _direct(session, request, caller, Command.PROMOTE)

    def Rollback(self, session: Session, request: Any, caller: Caller) -> pb.Rollout:
        """Goes back to the version that served before."""
        return _direct(session, request, caller, Command.ROLLBACK, request.reason)

    def Pause(self, session: Session, request: Any, caller: Caller) -> pb.Rollout:
        """Stays at the present step."""
        return _direct(session, request, caller, Command.PAUSE, request.reason)

    def Resume(self, session: Session, request: Any, caller: Caller) -> pb.Rollout:
        """Goes on from the present step."""
        return _direct(session, request, caller, Command.RESUME)

    def Abort(self, session: Session, request: Any, caller: Caller) -> pb.Rollout:
        """Ends a rollout with the old version."""
        return _direct(session, request, caller, Command.ABORT, request.reason)

    def GetRollout(self, session: Session, request: Any, caller: Caller) -> pb.Rollout:
        """One rollout by its id, or a model's newest."""
        if request.id:
            found = rollouts.get_rollout(session, request.id)
            if not caller.access.permit(found.model) or request.model not in ("", found.model):
                raise NotFoundError(f"there is no rollout {show(request.id)}")
            return encode_rollout(found)
        _require(session, request.model, caller)
        newest = rollouts.find_newest_rollout(session, request.model)
        if newest is None:
            raise NotFoundError(f"model '{request.model}' has had no rollout")
        return encode_rollout(newest)

    def ListRollouts(self, session: Session, request: Any, caller: Caller) -> pb.ListRolloutsResponse:
        """A page of a model's rollouts, the newest first."""
        _require(session, request.model, caller)
        page = rollouts.list_rollouts(session, request.model, size=request.page_size, token=request.page_token)
        return encode_page(pb.ListRolloutsResponse(), "rollouts", page, encode_rollout)

    async def WatchEvents(self, request: Any, context: Any) -> AsyncIterator[pb.Event]:
        """What happened and what happens. The headers are sent at once, with where it begins: nothing is missed."""
        caller = Caller.current()
        if request.model:
            caller.require_model(request.model)
            check_model_name(request.model)
        position = await self._feed.find_position(request.after, request.model)
        who = caller.name if caller.access.permission is not None else ""
        events = self._feed.watch(position, request.model, caller.sees, who)
        try:
            await context.send_initial_metadata(((POSITION_KEY, str(position)),))
            async for event in events:
                yield encode_event(event)
        finally:
            await events.aclose()


def _direct(session: Session, request: Any, caller: Caller, verb: Command, reason: str = "") -> pb.Rollout:
    outcome = service.direct(session, request.model, verb, actor=caller.name, reason=reason)
    if outcome.rollout is None:
        raise NotFoundError(f"model '{request.model}' has had no rollout")
    return encode_rollout(outcome.rollout)


def _require(session: Session, model: str, caller: Caller) -> None:
    if not model:
        raise InvalidField("model", "is empty; expected the name of a model")
    caller.require_model(model)
    models.get(session, check_model_name(model))


def _describe(session: Session, model: str) -> pb.Deployment:
    deployment = deployments.get_deployment(session, model)
    return _encode(session, deployment, read_server_statuses(session, model, within_s=HEARD_S), True)


def _encode(
    session: Session, deployment: Deployment, statuses: Sequence[ServerStatus], with_rollout: bool
) -> pb.Deployment:
    rollout = rollouts.find_newest_rollout(session, deployment.model) if with_rollout else None
    return encode_deployment(deployment, statuses, rollout)


def _check_mask(mask: FieldMask) -> FieldMask:
    """The mask; InvalidField where it names what no deployment has."""
    known = pb.Deployment.DESCRIPTOR
    unknown = [path for path in mask.paths if not FieldMask(paths=[path]).IsValidForDescriptor(known)]
    if unknown:
        names, fields = ", ".join(map(show, unknown[:5])), ", ".join(field.name for field in known.fields)
        raise InvalidField("read_mask", f"names {names}; expected some of {fields}, or fields inside one")
    return mask
