"""The asyncio admin client."""

from __future__ import annotations

from aiorch_client.admin.aio.access_methods import AsyncAccessMethods
from aiorch_client.admin.aio.deployment_methods import AsyncDeploymentMethods
from aiorch_client.admin.aio.registry_methods import AsyncRegistryMethods
from aiorch_client.admin.aio.tuning_methods import AsyncTuningMethods

__all__ = ["AsyncAdminClient"]


class AsyncAdminClient(AsyncRegistryMethods, AsyncDeploymentMethods, AsyncAccessMethods, AsyncTuningMethods):
    """``AdminClient`` for asyncio: the same calls, awaited. Belongs to the event loop of its first call."""
