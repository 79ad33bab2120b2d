"""Registers, deploys and rolls out models at a server of AIOrchestrator that has a registry.

::

    from aiorch_client.admin import AdminClient, RolloutPlan, Strategy

    with AdminClient("127.0.0.1:8001") as admin:
        version = admin.push("digits", "digits.onnx", aliases=["prod"])
        deployment = admin.deploy("digits", version.version, plan=RolloutPlan(Strategy.CANARY))
        print(admin.wait(deployment.rollout).reason)
"""

from aiorch_client.admin.access_types import (
    ApiKey,
    AuditCheck,
    AuditEntry,
    Identity,
    NewApiKey,
    Permission,
    Quota,
    Role,
    RoleBinding,
)
from aiorch_client.admin.aio import AsyncAdminClient
from aiorch_client.admin.client import AdminClient
from aiorch_client.admin.deployment_types import (
    CanaryStep,
    Deployment,
    DeploymentState,
    Event,
    Gates,
    Rollout,
    RolloutPlan,
    RolloutState,
    ServerStatus,
    Strategy,
    TrafficTarget,
    VersionReport,
    VersionStatus,
)
from aiorch_client.admin.tuning_types import Decision, Explanation, Objective, RecordedTraffic
from aiorch_client.admin.types import ArtefactFile, Model, ModelVersion, Provenance, TensorSignature, Upload

__all__ = [
    "AdminClient",
    "ApiKey",
    "ArtefactFile",
    "AsyncAdminClient",
    "AuditCheck",
    "AuditEntry",
    "CanaryStep",
    "Decision",
    "Deployment",
    "DeploymentState",
    "Event",
    "Explanation",
    "Gates",
    "Identity",
    "Model",
    "ModelVersion",
    "NewApiKey",
    "Objective",
    "Permission",
    "Provenance",
    "Quota",
    "RecordedTraffic",
    "Role",
    "RoleBinding",
    "Rollout",
    "RolloutPlan",
    "RolloutState",
    "ServerStatus",
    "Strategy",
    "TensorSignature",
    "TrafficTarget",
    "Upload",
    "VersionReport",
    "VersionStatus",
]
