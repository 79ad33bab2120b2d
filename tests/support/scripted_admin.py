"""The admin services over gRPC as a test scripts them: a small registry in memory, and failures to order."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from aiorch_proto.admin.v1 import access_pb2, audit_pb2, deployments_pb2, registry_pb2, tuning_pb2
from aiorch_proto.admin.v1.service import METHODS
from google.rpc import error_details_pb2, status_pb2

STATUS = grpc.StatusCode


@dataclass
class Refusal:
    """How the next call of a method fails; ``is_late``: after it was carried out."""

    code: grpc.StatusCode
    text: str = "no"
    reason: str = ""
    retry_after_s: float | None = None
    is_late: bool = False

    def abort(self, context: Any) -> None:
        details = status_pb2.Status(code=self.code.value[0], message=self.text)
        if self.reason:
            details.details.add().Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain="aiorch.dev"))
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(round(self.retry_after_s * 1e9))
            details.details.add().Pack(retry)
        if details.details:
            context.set_trailing_metadata((("grpc-status-details-bin", details.SerializeToString()),))
        context.abort(self.code, self.text)


@dataclass
class Upload:
    header: Any
    content: bytearray
    version: int = 0


class ScriptedAdmin:
    """Answers each method that it has, notes the requests by method, and fails as ``refusals`` say."""

    def __init__(self, *, without: tuple[str, ...] = ()) -> None:
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.metadata: list[dict[str, Any]] = []
        self.refusals: dict[str, deque[Refusal]] = defaultdict(deque)
        self.models: dict[str, registry_pb2.Model] = {}
        self.versions: dict[str, list[registry_pb2.ModelVersion]] = defaultdict(list)
        self.uploads: dict[str, Upload] = {}
        self.keeps_content = True
        #: Called with the bytes of an upload after each piece.
        self.on_received: Callable[[int], object] = lambda received: None
        self.answers: dict[str, Any] = {}
        self.deployments: dict[str, deployments_pb2.Deployment] = {}
        self.objectives: dict[str, tuning_pb2.Objective] = {}
        #: What GetRollout gives in turn; the last one again and again.
        self.rollouts: deque[deployments_pb2.Rollout] = deque()
        #: What each watch gives, then how it ends; None: it stays open until the test ends.
        self.watches: deque[tuple[list[deployments_pb2.Event], Refusal | None]] = deque()
        #: The number of the last event, as each watch is told; None: by a server that does not tell.
        self.last_event: int | None = None
        #: Until it is set no watch ends: a call of grpc.aio that ends with its headers may not tell of these.
        self.may_end = threading.Event()
        self.may_end.set()
        self.closing = threading.Event()
        self.server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", 8 << 20)])
        for service in {method.service for method in METHODS.values()}:
            handlers = {
                method.name: self._handle(method, getattr(self, method.name))
                for method in METHODS.values()
                if method.service == service and hasattr(self, method.name) and method.name not in without
            }
            self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self.url = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def close(self) -> None:
        self.closing.set()
        self.may_end.set()
        self.server.stop(None).wait(10)

    def _handle(self, method: Any, answer: Callable[..., Any]) -> Any:
        def enter(request: Any, context: Any) -> Refusal | None:
            self.metadata.append(dict(context.invocation_metadata()))
            if not method.client_streams:
                self.requests[method.name].append(request)
            waiting = self.refusals[method.name]
            refusal = waiting.popleft() if waiting else None
            if refusal is not None and not refusal.is_late:
                refusal.abort(context)
            return refusal

        def unary(request: Any, context: Any) -> Any:
            refusal = enter(request, context)
            key = getattr(request, "idempotency_key", "")
            found = self.answers.get(key) if key else None
            if found is None:
                found = answer(request, context)
                if key:
                    self.answers[key] = found
            if refusal is not None:
                refusal.abort(context)
            return found

        def stream(request: Any, context: Any) -> Iterator[Any]:
            enter(request, context)
            yield from answer(request, context)

        codecs = {
            "request_deserializer": method.request.FromString,
            "response_serializer": method.response.SerializeToString,
        }
        if method.client_streams:
            return grpc.stream_unary_rpc_method_handler(unary, **codecs)
        if method.server_streams:
            return grpc.unary_stream_rpc_method_handler(stream, **codecs)
        return grpc.unary_unary_rpc_method_handler(unary, **codecs)

    # ModelRegistry

    def RegisterModel(self, request: Any, context: Any) -> Any:
        if request.name in self.models:
            Refusal(STATUS.ALREADY_EXISTS, f"model '{request.name}' exists", "ALREADY_EXISTS").abort(context)
        model = registry_pb2.Model(name=request.name, description=request.description, labels=request.labels)
        self.models[request.name] = model
        return model

    def GetModel(self, request: Any, context: Any) -> Any:
        return self._find(request.name, context)

    def UpdateModel(self, request: Any, context: Any) -> Any:
        model = self._find(request.model.name, context)
        for path in request.update_mask.paths:
            model.ClearField(path)
            model.MergeFrom(registry_pb2.Model(**{path: getattr(request.model, path)}))
        return model

    def ListModels(self, request: Any, context: Any) -> Any:
        names = sorted(name for name in self.models if name.startswith(request.name_prefix))
        start = int(request.page_token or 0)
        end = start + min(request.page_size, 3)  # small pages, to see the client ask on
        token = str(end) if end < len(names) else ""
        return registry_pb2.ListModelsResponse(
            models=[self.models[name] for name in names[start:end]], next_page_token=token
        )

    def DeleteModel(self, request: Any, context: Any) -> Any:
        self._find(request.name, context)
        del self.models[request.name]
        return registry_pb2.DeleteModelResponse()

    def GetVersion(self, request: Any, context: Any) -> Any:
        model = self._find(request.model, context)
        number = request.version or (model.aliases.get(request.alias, 0) if request.alias else model.latest_version)
        for version in self.versions[request.model]:
            if version.version == number:
                return version
        Refusal(STATUS.NOT_FOUND, f"model '{request.model}' has no such version", "UNKNOWN_VERSION").abort(context)
        return None

    def ListVersions(self, request: Any, context: Any) -> Any:
        self._find(request.model, context)
        return registry_pb2.ListVersionsResponse(versions=reversed(self.versions[request.model]))

    def DeleteVersion(self, request: Any, context: Any) -> Any:
        self.versions[request.model] = [v for v in self.versions[request.model] if v.version != request.version]
        return registry_pb2.DeleteVersionResponse()

    def SetAlias(self, request: Any, context: Any) -> Any:
        model = self._find(request.model, context)
        if request.version:
            model.aliases[request.alias] = request.version
        else:
            model.aliases.pop(request.alias, None)
        return model

    def GetUpload(self, request: Any, context: Any) -> Any:
        upload = self.uploads.get(request.upload_id)
        if upload is None:
            Refusal(STATUS.NOT_FOUND, "no such upload", "NOT_FOUND_ERROR").abort(context)
            return None
        return registry_pb2.Upload(
            model=request.model,
            upload_id=request.upload_id,
            size_bytes=upload.header.size_bytes,
            received_bytes=self._received(upload),
            version=upload.version,
        )

    def UploadVersion(self, requests: Iterator[Any], context: Any) -> Any:
        header = next(requests).header
        self.requests["UploadVersion"].append(header)
        upload = self.uploads.setdefault(header.upload_id, Upload(header, bytearray()))
        if header.offset != self._received(upload):
            Refusal(STATUS.FAILED_PRECONDITION, f"offset {header.offset}").abort(context)
        with contextlib.suppress(Exception):  # of a stream that was cut
            for message in requests:
                assert len(message.chunk) <= 4 << 20
                self._append(upload, message.chunk)
                self.on_received(self._received(upload))
        if self._received(upload) < header.size_bytes:
            Refusal(STATUS.FAILED_PRECONDITION, "bytes are missing").abort(context)
        if self._digest(upload) != header.sha256:
            Refusal(STATUS.DATA_LOSS, "another checksum", "CHECKSUM_MISMATCH").abort(context)
        return self._make_version(upload)

    def _append(self, upload: Upload, chunk: bytes) -> None:
        if self.keeps_content:
            upload.content += chunk
            return
        state = self.__dict__.setdefault("_sums", {}).setdefault(upload.header.upload_id, [hashlib.sha256(), 0])
        state[0].update(chunk)
        state[1] += len(chunk)

    def _received(self, upload: Upload) -> int:
        if self.keeps_content:
            return len(upload.content)
        return int(self.__dict__.get("_sums", {}).get(upload.header.upload_id, [None, 0])[1])

    def _digest(self, upload: Upload) -> str:
        if self.keeps_content:
            return hashlib.sha256(upload.content).hexdigest()
        return str(self.__dict__["_sums"][upload.header.upload_id][0].hexdigest())

    def _make_version(self, upload: Upload) -> Any:
        header = upload.header
        model = self.models.setdefault(header.model, registry_pb2.Model(name=header.model))
        model.latest_version += 1
        upload.version = model.latest_version
        files = []
        if self.keeps_content:
            with tarfile.open(fileobj=io.BytesIO(upload.content)) as tar:
                for entry in tar:
                    content = tar.extractfile(entry)
                    assert content is not None
                    digest = hashlib.sha256(content.read()).hexdigest()
                    files.append(registry_pb2.ArtefactFile(path=entry.name, size_bytes=entry.size, sha256=digest))
        for alias in header.aliases:
            model.aliases[alias] = upload.version
        version = registry_pb2.ModelVersion(
            model=header.model,
            version=upload.version,
            digest=header.sha256,
            size_bytes=header.size_bytes,
            files=files,
            provenance=header.provenance,
            aliases=header.aliases,
            created_by="ann",
        )
        version.created_at.GetCurrentTime()
        self.versions[header.model].append(version)
        return version

    def _find(self, name: str, context: Any) -> Any:
        if name not in self.models:
            Refusal(STATUS.NOT_FOUND, f"model '{name}' is not registered", "UNKNOWN_MODEL").abort(context)
        return self.models[name]

    # Deployments

    def Deploy(self, request: Any, context: Any) -> Any:
        model = self._find(request.model, context)
        version = request.version or (model.aliases[request.alias] if request.alias else model.latest_version)
        before = self.deployments.get(request.model, deployments_pb2.Deployment())
        deployment = deployments_pb2.Deployment(
            model=request.model,
            generation=before.generation + 1,
            version=version,
            traffic=[deployments_pb2.TrafficTarget(version=version, percent=100, tag="stable")],
            state=deployments_pb2.DEPLOYMENT_STATE_READY,
            instances=request.instances,
            previous_version=before.version,
        )
        if self.rollouts:
            deployment.rollout.CopyFrom(self.rollouts[0])
        self.deployments[request.model] = deployment
        return deployment

    def Undeploy(self, request: Any, context: Any) -> Any:
        self._find_deployment(request.model, context)
        del self.deployments[request.model]
        return deployments_pb2.UndeployResponse()

    def GetDeployment(self, request: Any, context: Any) -> Any:
        return self._find_deployment(request.model, context)

    def ListDeployments(self, request: Any, context: Any) -> Any:
        return deployments_pb2.ListDeploymentsResponse(deployments=self.deployments.values())

    def Scale(self, request: Any, context: Any) -> Any:
        deployment = self._find_deployment(request.model, context)
        deployment.instances = request.instances
        return deployment

    def SetTraffic(self, request: Any, context: Any) -> Any:
        deployment = self._find_deployment(request.model, context)
        del deployment.traffic[:]
        deployment.traffic.extend(request.traffic)
        return deployment

    def _find_deployment(self, name: str, context: Any) -> Any:
        if name not in self.deployments:
            Refusal(STATUS.NOT_FOUND, f"model '{name}' is not deployed", "NOT_FOUND_ERROR").abort(context)
        return self.deployments[name]

    def _next_rollout(self, request: Any, context: Any) -> Any:
        if not self.rollouts:
            Refusal(STATUS.FAILED_PRECONDITION, "no rollout is under way", "PRECONDITION_FAILED").abort(context)
        return self.rollouts.popleft() if len(self.rollouts) > 1 else self.rollouts[0]

    Promote = Rollback = Pause = Resume = Abort = GetRollout = _next_rollout

    def ListRollouts(self, request: Any, context: Any) -> Any:
        return deployments_pb2.ListRolloutsResponse(rollouts=self.rollouts)

    def WatchEvents(self, request: Any, context: Any) -> Iterator[Any]:
        if self.last_event is not None:
            position = self.last_event if request.after == -1 else request.after
            context.send_initial_metadata((("aiorch-events-after", str(position)),))
        events, end = self.watches.popleft() if self.watches else ([], None)
        yield from events
        if end is not None:
            self.may_end.wait(20)
            end.abort(context)
        self.closing.wait(20)

    # Access and Audit

    def WhoAmI(self, request: Any, context: Any) -> Any:
        binding = access_pb2.RoleBinding(id="b1", principal="ann", role=access_pb2.ROLE_DEPLOYER, models="team-*")
        return access_pb2.Identity(principal="ann", tenant="ann", method="api-key", bindings=[binding])

    def ListPermissions(self, request: Any, context: Any) -> Any:
        permission = access_pb2.Permission(method="/aiorch.admin.v1.Deployments/Deploy", role=access_pb2.ROLE_DEPLOYER)
        return access_pb2.ListPermissionsResponse(permissions=[permission])

    def ListRoleBindings(self, request: Any, context: Any) -> Any:
        return access_pb2.ListRoleBindingsResponse(bindings=self.WhoAmI(request, context).bindings)

    def GrantRole(self, request: Any, context: Any) -> Any:
        return access_pb2.RoleBinding(
            id="b2", principal=request.principal, role=request.role, models=request.models, created_by="root"
        )

    def RevokeRole(self, request: Any, context: Any) -> Any:
        return access_pb2.RevokeRoleResponse()

    def CreateApiKey(self, request: Any, context: Any) -> Any:
        key = access_pb2.ApiKey(id="k123", principal=request.principal, tenant=request.tenant)
        if request.HasField("expires_at"):
            key.expires_at.CopyFrom(request.expires_at)
        return access_pb2.CreateApiKeyResponse(key=key, secret="aio_k123_hush")

    def ListApiKeys(self, request: Any, context: Any) -> Any:
        return access_pb2.ListApiKeysResponse(keys=[access_pb2.ApiKey(id="k123", principal="ann")])

    def RevokeApiKey(self, request: Any, context: Any) -> Any:
        return access_pb2.RevokeApiKeyResponse()

    def GetQuota(self, request: Any, context: Any) -> Any:
        return access_pb2.Quota(tenant=request.tenant, requests_per_s=5)

    def ListQuotas(self, request: Any, context: Any) -> Any:
        return access_pb2.ListQuotasResponse(quotas=[access_pb2.Quota(tenant="ann", requests_per_s=5)])

    def SetQuota(self, request: Any, context: Any) -> Any:
        return request.quota

    def QueryAudit(self, request: Any, context: Any) -> Any:
        entry = audit_pb2.AuditEntry(
            number=7, principal="ann", method="/a.B/C", model="digits", outcome="OK", hash="ab"
        )
        return audit_pb2.QueryAuditResponse(entries=[entry])

    def VerifyAudit(self, request: Any, context: Any) -> Any:
        if request.known_hash == "bad":
            return audit_pb2.VerifyAuditResponse(entries=7, broken_at=3, reason="entry 3 was changed")
        return audit_pb2.VerifyAuditResponse(is_intact=True, entries=7, head_hash="ab")

    # Tuning

    def GetObjective(self, request: Any, context: Any) -> Any:
        if request.model not in self.objectives:
            Refusal(STATUS.NOT_FOUND, f"model '{request.model}' has no objective", "NOT_FOUND_ERROR").abort(context)
        return self.objectives[request.model]

    def SetObjective(self, request: Any, context: Any) -> Any:
        given = request.objective
        kept = self.objectives.setdefault(given.model, tuning_pb2.Objective(model=given.model))
        for path in request.update_mask.paths:
            setattr(kept, path, getattr(given, path))
        return kept

    def Explain(self, request: Any, context: Any) -> Any:
        objective = self.objectives.get(request.model)
        explanation = tuning_pb2.Explanation(model=request.model, objective=objective, knobs={"instances": 2.0})
        decision = explanation.decisions.add(knob="instances", before=1, after=2, reason="p99 was 61 ms")
        decision.time.FromSeconds(1_700_000_000)
        return explanation
