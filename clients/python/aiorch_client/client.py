"""The blocking client."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import grpc
from aiorch_proto.v2.service import InferenceStub

from aiorch_client.calls import RequestLayer
from aiorch_client.channel import TlsConfig
from aiorch_client.connection import Connection
from aiorch_client.errors import ClientError, from_rpc_error
from aiorch_client.retry import RetryPolicy
from aiorch_client.types import (
    InferRequest,
    InferResult,
    Inputs,
    ModelIndexEntry,
    ModelMetadata,
    ModelStatistics,
    Parameter,
    ServerMetadata,
)

#: Asks a server for the status of a failed request of a stream instead of a text beside open replies.
STREAM_STATUS = ("triton_grpc_error", "true")


class Client(Connection):
    """A connection to one server of the V2 protocol; threads may share it.

    ``target`` is ``host:port`` (or ``unix:/path``). ``token`` travels as bearer authorization: over TLS, or where the
    network is trusted. Every call ends within ``timeout_s`` seconds, retries and look-ups included; calls take their
    own ``timeout_s``. Connects with the first call. All calls raise ``ClientError``, see ``aiorch_client.errors``.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:8001",
        *,
        tls: TlsConfig | None = None,
        token: str | None = None,
        metadata: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]] = (),
        timeout_s: float = 60.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        super().__init__(target, tls=tls, token=token, metadata=metadata)
        self._layer = RequestLayer(
            timeout_s=timeout_s, retry=retry or RetryPolicy(), clock_s=time.monotonic, draw=random.random
        )
        self._stub = InferenceStub(self._channel)

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Sequence[str] | None = None,
        parameters: Mapping[str, Parameter] | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> InferResult:
        """Runs ``model`` on ``inputs``: arrays (or lists) by name, or one alone where the model has one input.

        Names, dtypes and shapes are checked against the model's metadata before anything is sent. ``outputs`` None
        asks for all. A retryable failure is tried again, but for requests of a sequence.
        """
        request = InferRequest(model, inputs, version, outputs, parameters or {}, request_id)
        return self._run(self._layer.infer(request, timeout_s))

    @overload
    def stream(
        self, requests: Iterable[InferRequest], *, timeout_s: float | None = None, raise_errors: Literal[True] = True
    ) -> Iterator[InferResult]: ...

    @overload
    def stream(
        self, requests: Iterable[InferRequest], *, timeout_s: float | None = None, raise_errors: Literal[False]
    ) -> Iterator[InferResult | ClientError]: ...

    def stream(
        self, requests: Iterable[InferRequest], *, timeout_s: float | None = None, raise_errors: bool = True
    ) -> Iterator[InferResult | ClientError]:
        """Sends ``requests`` over one call, each when it is at hand, and gives the answers in order as they come.

        ``requests`` is consumed in a thread of its own. A failed request ends the stream with its error, or, with
        ``raise_errors`` False, yields the error in its place. A request that does not fit its model is not sent: no
        further one is taken, and its error is raised after the answers to those before it. ``timeout_s`` is for the
        whole stream. Closing the iterator cancels the call.
        """
        self._check_open()
        deadline_s = self._layer.start_deadline(timeout_s)
        failures: list[Exception] = []
        call = self._stub.ModelStreamInfer(
            self._prepare_all(requests, deadline_s, failures),
            timeout=deadline_s - time.monotonic(),
            metadata=(*self._metadata, STREAM_STATUS) if raise_errors else self._metadata,
        )
        try:
            for reply in call:
                item = self._layer.read_stream_reply(reply)
                if raise_errors and isinstance(item, ClientError):
                    raise item
                yield item
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()
        if failures:
            raise failures[0]

    def metadata(self, model: str, version: str = "", *, timeout_s: float | None = None) -> ModelMetadata:
        """Inputs, outputs and ready versions of a model, fresh from the server."""
        return self._run(self._layer.metadata(model, version, timeout_s=timeout_s))

    def config(self, model: str, version: str = "", *, timeout_s: float | None = None) -> dict[str, Any]:
        """The model's completed configuration, with the names of model_config.proto; unset fields are left out."""
        return self._run(self._layer.config(model, version, timeout_s=timeout_s))

    def statistics(
        self, model: str = "", version: str = "", *, timeout_s: float | None = None
    ) -> tuple[ModelStatistics, ...]:
        """Counts and times of one model, or of all."""
        return self._run(self._layer.statistics(model, version, timeout_s))

    def is_live(self, *, timeout_s: float | None = None) -> bool:
        """Whether the server answers and lives; False as well where it cannot be reached. One attempt."""
        return self._run(self._layer.is_live(timeout_s))

    def is_ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether the server takes requests; False as well where it cannot be reached. One attempt."""
        return self._run(self._layer.is_ready(timeout_s))

    def is_model_ready(self, model: str, version: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether the model takes requests; False as well where it, or the server, is not there. One attempt."""
        return self._run(self._layer.is_model_ready(model, version, timeout_s))

    def server_metadata(self, *, timeout_s: float | None = None) -> ServerMetadata:
        """Name, version and extensions of the server."""
        return self._run(self._layer.server_metadata(timeout_s))

    def index(self, *, ready_only: bool = False, timeout_s: float | None = None) -> tuple[ModelIndexEntry, ...]:
        """Every model version in the server's repositories, or only those that are ready."""
        return self._run(self._layer.index(ready_only, timeout_s))

    def load(
        self,
        model: str,
        *,
        config: Mapping[str, Any] | str | None = None,
        files: Mapping[str, bytes] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Loads a model, or loads it again, and returns when it is ready. Never retried.

        ``config`` (JSON text or a mapping) replaces the repository's; with it, ``files`` (``"1/model.onnx"`` -> bytes)
        replace the artefacts.
        """
        self._run(self._layer.load(model, config, files, timeout_s))

    def unload(self, model: str, *, unload_dependents: bool = False, timeout_s: float | None = None) -> None:
        """Takes a model out of service. Never retried."""
        self._run(self._layer.unload(model, unload_dependents, timeout_s))

    def _find(self, method: str) -> Any:
        return getattr(self._stub, method)

    def _prepare_all(
        self, requests: Iterable[InferRequest], deadline_s: float, failures: list[Exception]
    ) -> Iterator[Any]:
        try:
            for request in requests:
                yield self._run(self._layer.prepare(request, deadline_s))
        except Exception as error:  # kept for the reader: here, in gRPC's thread, nobody would see it
            failures.append(error)
