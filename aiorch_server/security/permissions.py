"""Who may call what: one row for each call of each door. What has no row is refused.

gRPC calls go by their path, REST calls by method and path as in the routes. docs/security.md shows the table
(docs/write_permissions.py).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from aiorch_server.security.roles import Role


class Scope(enum.StrEnum):
    """For what the caller must hold the role."""

    #: Nobody is asked who it is.
    OPEN = "open"
    #: Any caller who is known, with or without roles.
    KNOWN = "known"
    #: The model that the call names; lists show the models that the caller may see.
    MODEL = "model"
    #: Some model, whichever.
    ANYWHERE = "anywhere"
    #: All models: it concerns the whole server.
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Permission:
    """What ``call`` needs; ``change`` where changing needs more than reading with the same call.

    ``field`` is for calls that look models up in the registry: the field of the request that names the model, with dots
    where it lies deeper. The planes ask for all others.
    """

    call: str
    scope: Scope
    role: Role | None = None
    change: Role | None = None
    field: str = ""

    @property
    def change_role(self) -> Role | None:
        """The role for changing."""
        return self.change or self.role


_V2: Final = "inference.GRPCInferenceService"
_OWN: Final = "aiorch.v2.GRPCInferenceService"
_ADMIN: Final = "aiorch.admin.v1"
_M: Final = "/v2/models/{model}"
_V: Final = _M + "/versions/{version}"
_R: Final = "/v2/repository"
_TARGETS: Final = tuple(f"/v1/models/{{model}}{which}" for which in ("", "/versions/{version}", "/labels/{label}"))
_NONE: Final[tuple[str, ...]] = ()
_REGION_VERBS: Final = ("Status", "Register", "Unregister")
_PREDICTION: Final = "tensorflow.serving.PredictionService"

#: Scope, role, role for changes, methods of the V2 service, calls over REST.
_SERVING: Final = (
    (
        Scope.OPEN, None, None, ("ServerLive", "ServerReady"),
        ("GET /v2/health/live", "GET /v2/health/ready"),
    ),
    (Scope.KNOWN, None, None, ("ServerMetadata",), ("GET /v2", "GET /openapi.json")),
    (
        Scope.MODEL, Role.VIEWER, None,
        ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex"),
        (
            f"GET {_M}/ready", f"GET {_V}/ready",
            "GET /v2/models/stats", f"GET {_M}/stats", f"GET {_V}/stats",
            f"GET {_M}/config", f"GET {_V}/config",
            f"GET {_M}", f"GET {_V}",
            f"POST {_R}/index", f"POST {_R}/{{repository}}/index",
            *(f"GET {each}" for each in _TARGETS), *(f"GET {each}/metadata" for each in _TARGETS),
        ),
    ),
    (
        Scope.MODEL, Role.CLIENT, None, ("ModelInfer", "ModelStreamInfer"),
        (
            *(f"POST {each}/{verb}" for each in (_M, _V) for verb in ("infer", "generate", "generate_stream")),
            *(f"POST {each}:{verb}" for each in _TARGETS for verb in ("predict", "classify", "regress")),
        ),
    ),
    (
        Scope.MODEL, Role.DEPLOYER, None, ("RepositoryModelLoad", "RepositoryModelUnload"),
        (f"POST {_R}/models/{{model}}/load", f"POST {_R}/models/{{model}}/unload"),
    ),
    (
        Scope.KNOWN, None, None, _NONE,
        tuple(f"POST {_R}/{{repository}}/models/{{model}}/{verb}" for verb in ("load", "unload")),
    ),
    (
        Scope.ANYWHERE, Role.CLIENT, None,
        tuple(f"{kind}SharedMemory{what}" for kind in ("System", "Cuda") for what in _REGION_VERBS),
        tuple(
            f"{method} /v2/{kind}sharedmemory{path}"
            for kind in ("system", "cuda")
            for method, path in (
                ("GET", "/status"), ("GET", "/region/{region}/status"), ("POST", "/region/{region}/register"),
                ("POST", "/unregister"), ("POST", "/region/{region}/unregister"),
            )
        ),
    ),
    (Scope.MODEL, Role.VIEWER, Role.ADMIN, ("TraceSetting",), (f"GET {_M}/trace/setting",)),
    (Scope.MODEL, Role.ADMIN, None, _NONE, (f"POST {_M}/trace/setting",)),
    (Scope.SERVER, Role.VIEWER, None, _NONE, ("GET /v2/trace/setting", "GET /v2/logging", "GET /metrics")),
    (Scope.SERVER, Role.ADMIN, None, ("LogSettings",), ("POST /v2/trace/setting", "POST /v2/logging")),
)  # fmt: skip

#: Calls with paths of their own.
_OTHERS: Final = (
    (Scope.OPEN, None, ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")),
    (
        Scope.KNOWN, None,
        tuple(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")),
    ),
    (
        Scope.MODEL, Role.CLIENT,
        tuple(f"/{_PREDICTION}/{each}" for each in ("Classify", "Regress", "Predict", "MultiInference")),
    ),
    (
        Scope.MODEL, Role.VIEWER,
        (f"/{_PREDICTION}/GetModelMetadata", "/tensorflow.serving.ModelService/GetModelStatus"),
    ),
    (Scope.SERVER, Role.ADMIN, ("/tensorflow.serving.ModelService/HandleReloadConfigRequest",)),
)  # fmt: skip

#: Scope, role, field that names the model, methods of the admin services.
_ADMINISTRATION: Final = (
    (Scope.MODEL, Role.VIEWER, "name", ("ModelRegistry/GetModel",)),
    (Scope.MODEL, Role.VIEWER, "model", ("ModelRegistry/GetVersion", "ModelRegistry/ListVersions")),
    (Scope.MODEL, Role.VIEWER, "", ("ModelRegistry/ListModels", "Deployments/ListDeployments")),
    (Scope.MODEL, Role.DEPLOYER, "name", ("ModelRegistry/RegisterModel", "ModelRegistry/DeleteModel")),
    (Scope.MODEL, Role.DEPLOYER, "model.name", ("ModelRegistry/UpdateModel",)),
    (Scope.MODEL, Role.DEPLOYER, "header.model", ("ModelRegistry/UploadVersion",)),
    (
        Scope.MODEL, Role.DEPLOYER, "model",
        (
            "ModelRegistry/GetUpload", "ModelRegistry/DeleteVersion", "ModelRegistry/SetAlias",
            *(f"Deployments/{each}" for each in ("Deploy", "Undeploy", "Scale", "SetTraffic")),
            *(f"Deployments/{each}" for each in ("Promote", "Rollback", "Pause", "Resume", "Abort")),
        ),
    ),
    (Scope.MODEL, Role.VIEWER, "model", ("Deployments/GetDeployment", "Tuning/GetObjective", "Tuning/Explain")),
    (Scope.MODEL, Role.VIEWER, "", ("Deployments/GetRollout", "Deployments/ListRollouts", "Deployments/WatchEvents")),
    (Scope.MODEL, Role.DEPLOYER, "objective.model", ("Tuning/SetObjective",)),
    (Scope.MODEL, Role.DEPLOYER, "model", ("Tuning/RecordTraffic",)),
    (Scope.KNOWN, None, "", ("Access/WhoAmI", "Access/ListPermissions")),
    (
        Scope.SERVER, Role.ADMIN, "",
        (
            *(
                f"Access/{each}"
                for each in (
                    "ListRoleBindings", "GrantRole", "RevokeRole", "CreateApiKey", "ListApiKeys", "RevokeApiKey",
                    "GetQuota", "ListQuotas", "SetQuota",
                )
            ),
            "Audit/QueryAudit", "Audit/VerifyAudit",
        ),
    ),
)  # fmt: skip


def _list_permissions() -> Iterator[Permission]:
    for scope, role, change, methods, routes in _SERVING:
        for method in methods:
            for service in (_V2, _OWN):
                yield Permission(f"/{service}/{method}", scope, role, change)
        for route in routes:
            yield Permission(route, scope, role, change)
    for scope, role, paths in _OTHERS:
        for path in paths:
            yield Permission(path, scope, role)
    for scope, role, field, methods in _ADMINISTRATION:
        for method in methods:
            yield Permission(f"/{_ADMIN}.{method}", scope, role, None, field)


#: All permissions by their call.
TABLE: Final[Mapping[str, Permission]] = MappingProxyType({each.call: each for each in _list_permissions()})
