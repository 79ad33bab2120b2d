"""Restrictions at the gRPC doors, as an interceptor: a call is refused before one byte of its messages is read.

The compiled path ends where inference is restricted, since no other method of it is skipped; other servers keep it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import grpc
from aiorch_proto.tfserving.names import METHOD_NAMES
from aiorch_proto.v2.service import METHODS, PACKAGE_SERVICE_NAME, SERVICE_NAME

from aiorch_server.config.restriction import Group
from aiorch_server.frontends.grpc.health import HEALTH_NAME
from aiorch_server.frontends.grpc.methods import RpcMethod
from aiorch_server.frontends.grpc.reflection import REFLECTION_NAMES
from aiorch_server.frontends.grpc.status import describe_error
from aiorch_server.frontends.restriction import AccessRestricted, AccessRules

_V2: Final[Mapping[str, Group]] = {
    "ServerLive": Group.HEALTH,
    "ServerReady": Group.HEALTH,
    "ModelReady": Group.HEALTH,
    "ServerMetadata": Group.METADATA,
    "ModelMetadata": Group.METADATA,
    "ModelInfer": Group.INFERENCE,
    "ModelStreamInfer": Group.INFERENCE,
    "ModelConfig": Group.MODEL_CONFIG,
    "ModelStatistics": Group.STATISTICS,
    "RepositoryIndex": Group.MODEL_REPOSITORY,
    "RepositoryModelLoad": Group.MODEL_REPOSITORY,
    "RepositoryModelUnload": Group.MODEL_REPOSITORY,
    "SystemSharedMemoryStatus": Group.SHARED_MEMORY,
    "SystemSharedMemoryRegister": Group.SHARED_MEMORY,
    "SystemSharedMemoryUnregister": Group.SHARED_MEMORY,
    "CudaSharedMemoryStatus": Group.SHARED_MEMORY,
    "CudaSharedMemoryRegister": Group.SHARED_MEMORY,
    "CudaSharedMemoryUnregister": Group.SHARED_MEMORY,
    "TraceSetting": Group.TRACE,
    "LogSettings": Group.LOGGING,
}
#: By what they tell or do: states of versions answer what ModelReady and ModelMetadata answer, so they need both.
_SERVING: Final[Mapping[str, tuple[Group, ...]]] = {
    "Classify": (Group.INFERENCE,),
    "Regress": (Group.INFERENCE,),
    "Predict": (Group.INFERENCE,),
    "MultiInference": (Group.INFERENCE,),
    "GetModelMetadata": (Group.METADATA,),
    "GetModelStatus": (Group.HEALTH, Group.METADATA),
    "HandleReloadConfigRequest": (Group.MODEL_REPOSITORY,),
}


def _list_groups() -> Iterator[tuple[str, tuple[Group, ...]]]:
    for service in (SERVICE_NAME, PACKAGE_SERVICE_NAME):
        for name in METHODS:
            yield f"/{service}/{name}", (_V2[name],)
    for service, names in METHOD_NAMES.items():
        for name in names:
            yield f"/{service}/{name}", _SERVING[name]
    for name in ("Check", "Watch"):
        yield f"/{HEALTH_NAME}/{name}", (Group.HEALTH,)
    for service in REFLECTION_NAMES:
        yield f"/{service}/ServerReflectionInfo", (Group.METADATA,)


#: The groups of every method, by its path.
GROUPS: Final[Mapping[str, tuple[Group, ...]]] = MappingProxyType(dict(_list_groups()))


class RestrictionInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses what ``rules`` refuse; methods that need no header are skipped."""

    def __init__(self, rules: AccessRules) -> None:
        self._rules = rules
        self.skipped_methods: Collection[str] = frozenset(path for path, each in GROUPS.items() if rules.is_open(each))

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The method's own handler, or one that refuses."""
        groups = GROUPS.get(details.method)
        handler = None
        if groups is None:
            # Nobody's, or of a service that this table does not know: that one needs all headers there are.
            handler = await continuation(details)
            if handler is None:
                return None
            groups = tuple(Group)
        refusal = self._rules.find_refusal(groups, list(_encode(details.invocation_metadata)))
        if refusal is not None:
            return _make_refusing(refusal)
        return handler or await continuation(details)


def _make_refusing(refusal: AccessRestricted) -> RpcMethod:
    async def refuse(messages: Any, context: Any) -> None:
        await context.abort(*describe_error(refusal))

    # Streams, whatever the method is: of others the message would be read first.
    return RpcMethod(request_streaming=True, response_streaming=True, stream_stream=refuse)


def _encode(metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[tuple[bytes, bytes]]:
    for name, value in metadata or ():
        yield name.encode(), value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
