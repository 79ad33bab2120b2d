"""What stands on the registry: the models that it deploys, who may call, and the admin services."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiorch_server._core import Passes, Scheduler
from aiorch_server.config.registry import RegistryConfig
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import InvalidSettings, PreconditionFailed
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.repository import FilesystemRepository, ModelRepository, UnionRepository
from aiorch_server.security.find import open_gate

if TYPE_CHECKING:
    from aiorch_server.deployments.local import LocalDeployments
    from aiorch_server.frontends.admin.registry_access import RegistryAccess
    from aiorch_server.frontends.admin.services import AdminServices
    from aiorch_server.optimizer.optimizer import Account
    from aiorch_server.security.gate import Gate

logger = logging.getLogger(__name__)


def open_deployments(config: RegistryConfig) -> LocalDeployments | None:
    """What follows the registry, None without one; InvalidSettings where what it needs is not installed."""
    if not config.is_enabled:
        return None
    try:
        from aiorch_server.deployments.local import LocalDeployments
    except ImportError as error:
        raise InvalidSettings(
            f"registry.url: a registry needs the extra 'admin' (pip install 'aiorchestrator[admin]'): {error}"
        ) from error
    return LocalDeployments(config)


def open_repository(config: ServerConfig, deployments: LocalDeployments | None) -> ModelRepository:
    """The models in folders, and with a registry those that it deploys."""
    stored = FilesystemRepository(config.repository.paths)
    return stored if deployments is None else UnionRepository(stored, deployments.repository)


def build_gate(config: ServerConfig, deployments: LocalDeployments | None, passes: Passes | None) -> Gate | None:
    """Who says who calls, None for nobody; ``passes`` is what it publishes to the compiled door.

    InvalidSettings where nobody could say who one is; tells the log of doors that are open to everybody.
    """
    doors = (config.grpc, config.http, config.metrics)
    has_certificates = any(each.enabled and each.tls.require_client_auth for each in doors)
    known: RegistryAccess | None = None
    if deployments is not None:
        from aiorch_server.frontends.admin.registry_access import RegistryAccess

        known = RegistryAccess(deployments.database)
    gate = open_gate(config.security, has_certificates=has_certificates, passes=passes, keys=known, source=known)
    for name in ("grpc", "http", "metrics"):
        if lack := config.find_exposure(name):
            logger.warning("%s is open although it should not be (security.insecure): %s", name, lack)
    return gate


def build_admin(
    config: ServerConfig,
    deployments: LocalDeployments | None,
    gate: Gate | None,
    *,
    server: str,
    explain: Callable[[str], Sequence[Account]],
    manager: LifecycleManager,
) -> AdminServices | None:
    """The admin services of a server called ``server``, None without a registry."""
    if deployments is None:
        return None
    from aiorch_server.frontends.admin.services import AdminServices, read_bounds

    return AdminServices(
        deployments.database,
        read_bounds(config.registry),
        server=server,
        gate=gate,
        allow_code=config.execution.allow_code,
        on_commit=deployments.nudge,
        explain=explain,
        find_queue=functools.partial(find_queue, manager),
    )


def find_queue(manager: LifecycleManager, model: str, version: int) -> tuple[int, Scheduler]:
    """A ready version, 0: the first that has a share, and its queue.

    Raises as LifecycleManager.find, and PreconditionFailed where requests go through no one queue of its own.
    """
    servable = manager.find(model, str(version or ""))
    if servable.plain_scheduler is None:
        raise PreconditionFailed(
            f"model '{model}' version {servable.version} has no one queue of its own, as ensembles and models with "
            "sequences have none; record the models that it is made of"
        )
    return servable.version, servable.plain_scheduler
