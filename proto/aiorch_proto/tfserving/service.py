"""The methods of TensorFlow Serving's two services as a table: what client and server agree on beside the messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from aiorch_proto.tfserving import serving_pb2

#: The package of the services, as clients call them.
PACKAGE: Final = "tensorflow.serving"
#: The types of what GetModelMetadata packs, as clients unpack them.
TYPE_PREFIX: Final = f"type.googleapis.com/{PACKAGE}."


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its ``service`` and ``path`` on the wire, and its message classes. None of them streams."""

    name: str
    service: str
    path: str
    request: Any
    response: Any


#: All methods by name, in the order of the .proto file.
METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        method.name: Method(
            name=method.name,
            service=f"{PACKAGE}.{service.name}",
            path=f"/{PACKAGE}.{service.name}/{method.name}",
            request=getattr(serving_pb2, method.input_type.name),
            response=getattr(serving_pb2, method.output_type.name),
        )
        for service in serving_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
)
#: The names of the services.
SERVICE_NAMES: Final[tuple[str, ...]] = tuple(dict.fromkeys(method.service for method in METHODS.values()))
