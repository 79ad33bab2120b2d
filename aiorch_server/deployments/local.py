"""The part of a server that follows the registry, put together: the database, the store, what serves, who drives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiorch_server.config.registry import RegistryConfig
from aiorch_server.deployments.driver import Driver
from aiorch_server.deployments.identity import name_server
from aiorch_server.deployments.reconciler import Reconciler
from aiorch_server.registry.checkout import Checkout
from aiorch_server.registry.database import Database
from aiorch_server.registry.objectives import list_objectives
from aiorch_server.registry.records import Manifest
from aiorch_server.registry.store import ArtefactStore, open_store
from aiorch_server.repository import RegisteredRepository, RegisteredVersion

if TYPE_CHECKING:
    from aiorch_server.lifecycle.manager import LifecycleManager
    from aiorch_server.routing import Samples

logger = logging.getLogger(__name__)

LAST_KNOWN: Final = "last-known.json"
#: Where the artefacts are if the settings do not say.
ARTEFACTS: Final = "artefacts"


class LocalDeployments:
    """``repository`` is for the lifecycle; ``start`` when that can load models, ``stop`` before it stops.

    ``store`` exists from ``start`` on. For one event loop's thread. Raises InvalidSettings for a URL that cannot be.
    """

    store: ArtefactStore

    def __init__(self, config: RegistryConfig) -> None:
        self.database = Database(config.url.get_secret_value())
        self.repository = RegisteredRepository()
        #: What the registry calls this server, from ``start`` on.
        self.server = ""
        self._config = config
        self._checkout: Checkout | None = None
        self._reconciler: Reconciler | None = None
        self._driver: Driver | None = None

    @property
    def has_settled(self) -> bool:
        """Whether everything that was deployed at the start is as it should be, or has failed; it stays so."""
        return self._reconciler is not None and self._reconciler.has_settled

    @property
    def is_driving(self) -> bool:
        """Whether this server drives the rollouts."""
        return self._driver is not None and self._driver.is_driving

    async def start(
        self, manager: LifecycleManager, samples: Samples, *, address: str, on_change: Callable[[], None]
    ) -> None:
        """Returns when what is deployed serves or has failed; ``on_change`` as for Reconciler.

        ``address`` is this server's, such as ``host:8001``.

        Raises InvalidSettings for a store or a cache folder that cannot be used.
        """
        folder, file = self._config.cache_folder, self.database.url.file
        # The record and what it is a record of stay together, wherever the server is started from.
        beside = Path() if file is None else file.parent
        artefacts = self._config.artefacts or str(beside / ARTEFACTS)

        def open_files() -> tuple[ArtefactStore, Checkout, str]:
            store = open_store(artefacts, scratch=folder / "unpacking")
            checkout = Checkout(store, folder, most_bytes=self._config.cache_bytes)
            return store, checkout, name_server(address, folder)

        self.store, checkout, self.server = await asyncio.to_thread(open_files)
        place = self.database.url.place
        logger.info("registry in %s, artefacts in %s, cache in %s", place, self.store.name, folder.absolute())
        self._checkout = checkout

        def find_version(model: str, version: int, manifest: Manifest) -> RegisteredVersion:
            return RegisteredVersion(manifest.digest, lambda: checkout.acquire(model, version, manifest))

        driver = Driver(self.database, server=self.server, on_change=self.nudge)
        self._reconciler = Reconciler(
            self.database,
            manager,
            self.repository,
            samples,
            find_version,
            server=self.server,
            last_known=folder / LAST_KNOWN,
            on_change=on_change,
            on_contact=driver.notice,
        )
        await self._reconciler.start()
        self._driver = driver
        driver.start()

    async def read_objectives(self) -> dict[str, dict[str, Any]]:
        """Those that operators have set, as fields of tuning.proto by model; RegistryUnavailable."""
        return await self.database.read(list_objectives)

    def nudge(self) -> None:
        """What should run has changed, or what became of it: look at the registry at once, and tell it."""
        if self._reconciler is not None:
            self._reconciler.nudge()

    async def stop(self) -> None:
        """Follows and drives no more; what serves goes on serving, and the database is still there for others."""
        parts = [part for part in (self._driver, self._reconciler) if part is not None]
        await asyncio.gather(*(part.stop() for part in parts))

    async def close(self) -> None:
        """Lets go of the database and the files; when nothing serves any more."""
        if self._checkout is not None:
            await asyncio.to_thread(self._checkout.close)
        await self.database.aclose()
