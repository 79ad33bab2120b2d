"""The request layer without I/O: every call as steps that ``Client`` and ``AsyncClient`` carry out.

Checks and the metadata cache live here once; see ``steps`` for deadlines and retries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from aiorch_proto.v2 import inference_pb2 as pb

from aiorch_client.errors import ClientError, NotFoundError, RequestError, UnavailableError
from aiorch_client.messages import (
    check_version,
    decode_infer,
    decode_model_metadata,
    decode_statistics,
    decode_stream_reply,
    encode_infer,
    find_missing,
    to_plain,
)
from aiorch_client.retry import RetryPolicy
from aiorch_client.steps import CallLayer, Steps
from aiorch_client.types import (
    InferRequest,
    InferResult,
    ModelIndexEntry,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
)

#: An inference with one of these belongs to a place in an order, so it is never sent a second time.
_ORDERED_PARAMETERS = frozenset({"sequence_id", "sequence_start", "sequence_end"})


class RequestLayer(CallLayer):
    """Makes the steps of every call; keeps the models' metadata. Usable from several threads at once."""

    def __init__(
        self, *, timeout_s: float, retry: RetryPolicy, clock_s: Callable[[], float], draw: Callable[[], float]
    ) -> None:
        super().__init__(timeout_s=timeout_s, retry=retry, clock_s=clock_s, draw=draw)
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}
        self._optional: dict[tuple[str, str], frozenset[str]] = {}

    def infer(self, request: InferRequest, timeout_s: float | None) -> Steps[InferResult]:
        """Checks, sends and decodes; once more where the model turns out to have changed since it was looked up."""
        deadline_s = self.start_deadline(timeout_s)
        message = yield from self.prepare(request, deadline_s)
        is_repeatable = _ORDERED_PARAMETERS.isdisjoint(request.parameters)
        try:
            reply = yield from self._call("ModelInfer", message, deadline_s, is_repeatable=is_repeatable)
        except (RequestError, NotFoundError) as error:
            if error.code not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
                raise
            key = (request.model, request.version)
            known = self._metadata.get(key)
            self.forget(request.model)
            # Nothing ran, so a sequence keeps its place. Raises by itself where model or inputs do not fit now.
            message = yield from self.prepare(request, deadline_s)
            if self._metadata.get(key) == known:
                raise
            reply = yield from self._call("ModelInfer", message, deadline_s, is_repeatable=is_repeatable)
        return self.notice(decode_infer(reply))

    def prepare(self, request: InferRequest, deadline_s: float) -> Steps[Any]:
        """The checked ModelInferRequest; looks the model up where it is not known, or may have changed since."""
        check_version(request.version)
        known = self._metadata.get((request.model, request.version))
        if known is not None:
            try:
                return (yield from self._fit(request, known, deadline_s))
            except RequestError:
                self.forget(request.model)
                fresh = yield from self.metadata(request.model, request.version, deadline_s=deadline_s)
                if fresh == known:
                    raise
        else:
            fresh = yield from self.metadata(request.model, request.version, deadline_s=deadline_s)
        return (yield from self._fit(request, fresh, deadline_s))

    def _fit(self, request: InferRequest, metadata: ModelMetadata, deadline_s: float) -> Steps[Any]:
        """The message if ``request`` fits ``metadata``; asks for the configuration only where an input is missing."""
        message = encode_infer(request, metadata)
        missing = find_missing(request, metadata)
        if missing:
            key = (request.model, request.version)
            optional = self._optional.get(key)
            if optional is None:
                config = yield from self.config(*key, deadline_s=deadline_s)
                inputs = config.get("input", [])
                optional = frozenset(tensor["name"] for tensor in inputs if tensor.get("optional"))
                self._optional[key] = optional
            required = [name for name in missing if name not in optional]
            if required:
                raise RequestError(f"model '{request.model}' also needs input {', '.join(map(repr, required))}")
        return message

    def read_stream_reply(self, reply: Any) -> InferResult | ClientError:
        """The answer or error in one message of a stream."""
        item = decode_stream_reply(reply)
        return self.notice(item) if isinstance(item, InferResult) else item

    def notice(self, result: InferResult) -> InferResult:
        """``result`` itself; forgets the model where a version answered that was not there when it was looked up."""
        known = self._metadata.get((result.model_name, ""))
        if known is not None and known.versions and result.model_version not in known.versions:
            self.forget(result.model_name)
        return result

    def metadata(
        self, model: str, version: str, *, deadline_s: float | None = None, timeout_s: float | None = None
    ) -> Steps[ModelMetadata]:
        """Asks the server and keeps the answer."""
        request = pb.ModelMetadataRequest(name=model, version=version)
        reply = yield from self._call_named("ModelMetadata", request, deadline_s, timeout_s)
        self._metadata[model, version] = found = decode_model_metadata(reply)
        return found

    def config(
        self, model: str, version: str, *, deadline_s: float | None = None, timeout_s: float | None = None
    ) -> Steps[dict[str, Any]]:
        """The completed model configuration with the protocol's names."""
        request = pb.ModelConfigRequest(name=model, version=version)
        reply = yield from self._call_named("ModelConfig", request, deadline_s, timeout_s)
        return to_plain(reply.config)

    def statistics(self, model: str, version: str, timeout_s: float | None) -> Steps[tuple[ModelStatistics, ...]]:
        """Counts of one model or, for "", of all."""
        request = pb.ModelStatisticsRequest(name=model, version=version)
        return decode_statistics((yield from self._call_named("ModelStatistics", request, None, timeout_s)))

    def is_live(self, timeout_s: float | None) -> Steps[bool]:
        """Whether the server says that it lives."""
        return (yield from self._probe("ServerLive", pb.ServerLiveRequest(), "live", timeout_s))

    def is_ready(self, timeout_s: float | None) -> Steps[bool]:
        """Whether the server says that it serves."""
        return (yield from self._probe("ServerReady", pb.ServerReadyRequest(), "ready", timeout_s))

    def is_model_ready(self, model: str, version: str, timeout_s: float | None) -> Steps[bool]:
        """Whether the server says that the model serves; False for an unknown one."""
        request = pb.ModelReadyRequest(name=model, version=version)
        try:
            return (yield from self._probe("ModelReady", request, "ready", timeout_s))
        except (NotFoundError, RequestError) as error:
            if error.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                return False
            raise

    def server_metadata(self, timeout_s: float | None) -> Steps[ServerMetadata]:
        """Name, version and extensions."""
        deadline_s = self.start_deadline(timeout_s)
        reply = yield from self._call("ServerMetadata", pb.ServerMetadataRequest(), deadline_s)
        return ServerMetadata(name=reply.name, version=reply.version, extensions=tuple(reply.extensions))

    def index(self, is_ready_only: bool, timeout_s: float | None) -> Steps[tuple[ModelIndexEntry, ...]]:
        """What the repositories hold."""
        request = pb.RepositoryIndexRequest(ready=is_ready_only)
        reply = yield from self._call("RepositoryIndex", request, self.start_deadline(timeout_s))
        return tuple(ModelIndexEntry(m.name, m.version, m.state, m.reason) for m in reply.models)

    def load(
        self,
        model: str,
        config: Mapping[str, Any] | str | None,
        files: Mapping[str, bytes] | None,
        timeout_s: float | None,
    ) -> Steps[None]:
        """Loads, with a configuration and files in place of the repository's where given."""
        if files and config is None:
            raise RequestError("files come with a configuration: pass config as well")
        request = pb.RepositoryModelLoadRequest(model_name=model)
        if config is not None:
            request.parameters["config"].string_param = config if isinstance(config, str) else json.dumps(config)
        for path, content in (files or {}).items():
            request.parameters[path if path.startswith("file:") else f"file:{path}"].bytes_param = content
        deadline_s = self.start_deadline(timeout_s)
        # The lifecycle rpcs change the server, and say UNAVAILABLE where its control mode forbids them: one attempt.
        yield from self._call("RepositoryModelLoad", request, deadline_s, is_repeatable=False)
        self.forget(model)

    def unload(self, model: str, unload_dependents: bool, timeout_s: float | None) -> Steps[None]:
        """Takes a model out of service."""
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        request.parameters["unload_dependents"].bool_param = unload_dependents
        deadline_s = self.start_deadline(timeout_s)
        yield from self._call("RepositoryModelUnload", request, deadline_s, is_repeatable=False)
        self.forget(model)

    def forget(self, model: str) -> None:
        """Drops what is known of ``model``; it is looked up again when needed."""
        for cache in (self._metadata, self._optional):
            for key in [key for key in list(cache) if key[0] == model]:
                cache.pop(key, None)

    def _call_named(self, method: str, request: Any, deadline_s: float | None, timeout_s: float | None) -> Steps[Any]:
        """A call whose only argument is a model's name and version: an invalid argument means that there is none."""
        try:
            return (
                yield from self._call(
                    method, request, self.start_deadline(timeout_s) if deadline_s is None else deadline_s
                )
            )
        except ClientError as error:
            if error.code not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
                raise
            self.forget(request.name)
            raise NotFoundError(error.details, code=error.code) from error.__cause__

    def _probe(self, method: str, request: Any, field: str, timeout_s: float | None) -> Steps[bool]:
        """One attempt; a server that cannot be reached or does not answer in time is neither live nor ready."""
        deadline_s = self.start_deadline(timeout_s)
        try:
            return bool(getattr((yield from self._call(method, request, deadline_s, is_repeatable=False)), field))
        except UnavailableError:
            return False
