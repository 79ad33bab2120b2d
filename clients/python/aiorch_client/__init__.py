"""Python client of AIOrchestrator, and of any server that speaks the V2 inference protocol over gRPC.

::

    from aiorch_client import Client

    with Client("127.0.0.1:8001") as client:
        result = client.infer("digits_forest", images)  # a float32 array [rows, 64]
        print(result["label"], result.model_version)
"""

from aiorch_client.aio import AsyncClient
from aiorch_client.channel import TlsConfig
from aiorch_client.client import Client
from aiorch_client.errors import (
    ClientError,
    NotFoundError,
    RequestError,
    ServerError,
    UnavailableError,
    UnreachableError,
)
from aiorch_client.retry import NO_RETRIES, RetryPolicy
from aiorch_client.types import (
    BatchStatistics,
    Duration,
    InferRequest,
    InferResult,
    ModelIndexEntry,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
    TensorMetadata,
)

__all__ = [
    "NO_RETRIES",
    "AsyncClient",
    "BatchStatistics",
    "Client",
    "ClientError",
    "Duration",
    "InferRequest",
    "InferResult",
    "ModelIndexEntry",
    "ModelMetadata",
    "ModelStatistics",
    "NotFoundError",
    "RequestError",
    "RetryPolicy",
    "ServerError",
    "ServerMetadata",
    "TensorMetadata",
    "TlsConfig",
    "UnavailableError",
    "UnreachableError",
]
