"""All admin services over one registry: made, registered with a door, started and stopped together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.admin.v1.service import METHODS, SERVICE_NAMES

from aiorch_server.config.registry import RegistryConfig
from aiorch_server.deployments.housekeeping import Housekeeping
from aiorch_server.errors import AiorchError, PermissionDenied
from aiorch_server.frontends.admin.access_service import AccessServicer
from aiorch_server.frontends.admin.audit_service import AuditServicer
from aiorch_server.frontends.admin.caller import Caller, authorize
from aiorch_server.frontends.admin.deployments_service import DeploymentsServicer
from aiorch_server.frontends.admin.details import describe_failure
from aiorch_server.frontends.admin.feed import EventFeed
from aiorch_server.frontends.admin.model_registry import ModelRegistryServicer
from aiorch_server.frontends.admin.recording import FindQueue, TrafficRecorder, refuse_all
from aiorch_server.frontends.admin.registration import add_admin_services
from aiorch_server.frontends.admin.transactions import Transactions, is_change
from aiorch_server.frontends.admin.tuning import TuningServicer
from aiorch_server.frontends.admin.upload_service import UploadService
from aiorch_server.frontends.grpc.guard import GuardedServer, read_credentials
from aiorch_server.registry.archives import ArchiveBounds
from aiorch_server.registry.uploads import UploadBounds, Uploads
from aiorch_server.security.access import Access

if TYPE_CHECKING:
    from aiorch_server.optimizer.optimizer import Account
    from aiorch_server.registry.database import Database
    from aiorch_server.registry.store import ArtefactStore
    from aiorch_server.security.gate import Gate

__all__ = ["SERVICE_NAMES", "AdminServices", "read_bounds"]
#: What changes under way may take of a stop.
STOP_LIMIT_S: Final = 10.0


class AdminServices:
    """The admin services of a server called ``server``; on one event loop.

    ``gate`` None: nobody is asked who calls. ``allow_code``: what can run code of its author's choice may be deployed.
    ``on_commit`` is called on the loop after each change that was made here. ``explain`` tells what was done to the
    knobs of a model; ``find_queue`` gives the queue whose traffic may be recorded.
    """

    def __init__(
        self,
        database: Database,
        bounds: UploadBounds,
        *,
        server: str,
        gate: Gate | None = None,
        allow_code: bool = False,
        on_commit: Callable[[], None] = lambda: None,
        explain: Callable[[str], Sequence[Account]] = lambda model: (),
        find_queue: FindQueue = refuse_all,
    ) -> None:
        self._database = database
        self._bounds = bounds
        self._gate = gate
        self._on_commit = on_commit
        self._housekeeping: Housekeeping | None = None
        self._feed = EventFeed(database)
        self._transactions = Transactions(
            database,
            server=server,
            on_commit=self._tell,
            # Looked up with each change.
            settle_access=None if gate is None else lambda: gate.note_change(),
        )
        self._uploads = UploadService(self._transactions, bounds.lifetime_s)
        self._recorder = TrafficRecorder(find_queue)
        self._servicers: dict[str, Any] = {
            "ModelRegistry": ModelRegistryServicer(self._uploads),
            "Deployments": DeploymentsServicer(self._feed, allow_code=allow_code),
            "Tuning": TuningServicer(explain, self._recorder),
            "Access": AccessServicer(),
            "Audit": AuditServicer(database),
        }

    def register(self, server: Any) -> None:
        """Puts the services on ``server``, a ``grpc.aio.Server`` or one with its surface, behind the gate."""
        if self._gate is not None:
            server = GuardedServer(server, self._gate, self._refuse)
        add_admin_services(server, self._servicers, authorize, self._transactions)

    @property
    def watchers(self) -> int:
        """How many watch events now."""
        return self._feed.watchers

    def start(self, store: ArtefactStore) -> None:
        """Begins to follow the events, to take uploads into ``store``, and to tidy up; before the door opens."""
        uploads = Uploads(store, self._bounds)
        self._uploads.start(uploads)
        self._feed.start()
        self._housekeeping = Housekeeping(self._database, store, uploads)
        self._housekeeping.start()

    def announce_stop(self) -> None:
        """Ends all watches and recordings: a door that waits for its calls would wait for them."""
        self._feed.announce_stop()
        self._recorder.announce_stop()

    async def stop(self) -> None:
        """Refuses changes, and waits a while for those under way; the doors are closed by then."""
        if self._housekeeping is not None:
            await self._housekeeping.stop()
        await self._feed.stop()
        await self._transactions.close(STOP_LIMIT_S)
        self._uploads.close()

    async def _refuse(self, path: str, error: AiorchError, context: Any) -> Any:
        """Ends a call that the gate does not let through; a change by somebody who is known is written down."""
        failure, method = describe_failure(error), METHODS[path]
        if self._gate is not None and isinstance(error, PermissionDenied) and is_change(method):
            principal = await self._gate.identify(read_credentials(context))
            caller = Caller(principal.name, Access(principal))
            await self._transactions.refuse_as(method, "", "{}", error, caller)
        return await context.abort(*failure)

    def _tell(self) -> None:
        self._feed.wake()
        self._on_commit()


def read_bounds(config: RegistryConfig) -> UploadBounds:
    """The bounds of uploads in the settings."""
    return UploadBounds(
        archive_bytes=config.max_upload_bytes,
        lifetime_s=config.upload_expiry_secs,
        spare_bytes=config.min_free_bytes,
        archive=ArchiveBounds(expanded_bytes=config.max_unpacked_bytes, files=config.max_files),
    )
