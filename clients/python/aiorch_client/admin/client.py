"""The blocking admin client."""

from __future__ import annotations

from aiorch_client.admin.access_methods import AccessMethods
from aiorch_client.admin.deployment_methods import DeploymentMethods
from aiorch_client.admin.registry_methods import RegistryMethods
from aiorch_client.admin.tuning_methods import TuningMethods


class AdminClient(RegistryMethods, DeploymentMethods, AccessMethods, TuningMethods):
    """Registers, deploys and rolls out models at one server, and says who may; threads may share it.

    Arguments as of ``Client``. Calls raise ``ClientError`` (see ``aiorch_client.errors``), whose ``reason`` is the
    server's word for what is wrong. What fails for the network's or the server's sake is tried again within the call's
    time; each change carries an idempotency key, so that none is made twice. Lists ask for page after page.
    """
