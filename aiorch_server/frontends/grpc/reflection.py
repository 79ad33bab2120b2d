"""Server reflection (v1 and v1alpha); https://github.com/grpc/grpc/blob/master/doc/server-reflection.md."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.tfserving.names import METHOD_NAMES
from aiorch_proto.v2.service import SERVICE_NAME

from aiorch_server.errors import RequestError
from aiorch_server.frontends.grpc.health import HEALTH_NAME
from aiorch_server.frontends.grpc.methods import RpcMethod, add_methods
from aiorch_server.frontends.grpc.status import describe_error

if TYPE_CHECKING:
    from aiorch_server.frontends.grpc.descriptors import Descriptors

_V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
#: v1 has v1alpha's messages under another package; newer clients ask for it first.
_V1: Final = "grpc.reflection.v1.ServerReflection"
REFLECTION_NAMES: Final = (_V1, _V1ALPHA)


def add_reflection_service(server: Any, admin_services: Iterable[str] = ()) -> None:
    """Registers reflection (v1 and v1alpha) of all services that the application serves with ``server``.

    ``admin_services`` are the names of those that only servers with a registry have.
    """
    service = ReflectionService((SERVICE_NAME, *METHOD_NAMES, HEALTH_NAME, *REFLECTION_NAMES, *admin_services))
    methods = {"ServerReflectionInfo": RpcMethod(True, True, stream_stream=service.reflect)}
    for name in REFLECTION_NAMES:
        add_methods(server, name, methods)


class ReflectionService:
    """Answers about these services; what it answers from is imported and made when the first client asks."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = services

    @cached_property
    def _descriptors(self) -> Descriptors:
        from aiorch_server.frontends.grpc.descriptors import Descriptors

        return Descriptors(self._services)

    async def reflect(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """One serialized answer for each serialized request, in their order."""
        async for message in messages:
            try:
                answer = self._descriptors.answer(message)
            except RequestError as error:
                await context.abort(*describe_error(error))
            yield answer
