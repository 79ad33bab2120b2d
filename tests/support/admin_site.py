"""The admin services over a registry in SQLite and a store in a folder, behind either door."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hashlib
import io
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from aiorch_proto.admin.v1 import audit_pb2, registry_pb2
from aiorch_proto.admin.v1.service import AdminStub
from google.rpc import error_details_pb2 as rpc
from grpc_status import rpc_status

from aiorch_server.frontends.admin.details import DOMAIN
from aiorch_server.frontends.admin.services import SERVICE_NAMES, AdminServices
from aiorch_server.frontends.grpc import GrpcDoor, create_grpcio_server
from aiorch_server.frontends.grpc.methods import RpcMethod, RpcService
from aiorch_server.frontends.grpc.reflection import add_reflection_service
from aiorch_server.registry.database import Database
from aiorch_server.registry.store import ArtefactStore, open_store
from aiorch_server.registry.upgrade import upgrade_schema
from aiorch_server.registry.uploads import UploadBounds
from aiorch_server.security.access import UNRESTRICTED, Access, current_access
from aiorch_server.security.identity import Principal, RoleBinding
from aiorch_server.security.permissions import TABLE
from aiorch_server.security.roles import Role

TIMEOUT_S = 20.0


def open_door(door: str) -> Any:
    return create_grpcio_server() if door == "grpcio" else GrpcDoor(io_threads=1)


async def refused(call: Any) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """The error and its details by their kinds, ErrorInfo always among them."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(call, TIMEOUT_S)
    return raised.value, read_details(raised.value)


def read_details(error: Any) -> dict[str, Any]:
    # grpc_status reads calls, and an error of grpc.aio has the same in another form
    call = SimpleNamespace(
        code=error.code, details=error.details, trailing_metadata=lambda: list(error.trailing_metadata())
    )
    status = rpc_status.from_call(call)
    assert status is not None, error
    found = {}
    for detail in status.details:
        kind = getattr(rpc, detail.type_url.rpartition(".")[2])
        found[kind.__name__] = kind()
        assert detail.Unpack(found[kind.__name__])
    assert found["ErrorInfo"].domain == DOMAIN
    return found


async def status_of(call: Any) -> tuple[str, str]:
    """The name of the status and the reason that a call is refused with."""
    error, details = await refused(call)
    return error.code().name, details["ErrorInfo"].reason


@functools.cache
def make_tables() -> Path:
    """A database with all tables and nothing in them, to copy."""
    folder = Path(tempfile.mkdtemp(prefix="aiorch-tables-"))
    atexit.register(shutil.rmtree, folder)
    upgrade_schema(f"sqlite:///{folder}/registry.db")
    return folder / "registry.db"


class Site:
    """A server with the admin services; ``stub`` and ``channel`` are grpc.aio's."""

    def __init__(self, folder: Path, door: str, bounds: UploadBounds | None = None, url: str = "") -> None:
        self.url = url or f"sqlite:///{folder}/registry.db"
        self.folder, self.door, self.bounds = folder, door, bounds or UploadBounds(spare_bytes=0)
        self.commits = 0
        self.allow_code = True
        self.open_store: Callable[[], ArtefactStore] = lambda: open_store(str(self.folder / "artefacts"))

    async def start(self) -> None:
        if self.url.startswith("sqlite:///") and not (self.folder / "registry.db").exists():
            shutil.copyfile(await asyncio.to_thread(make_tables), self.folder / "registry.db")
        self.database = Database(self.url)
        self.store = self.open_store()
        self.services = AdminServices(
            self.database, self.bounds, server="here", allow_code=self.allow_code, on_commit=self._count
        )  # fmt: skip
        self.services._feed._interval_s = 0.1
        self.server = open_door(self.door)
        self.services.register(Gated(self.server))
        add_reflection_service(self.server, SERVICE_NAMES)
        self.target = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        self.services.start(self.store)
        self.uploads = self.services._uploads._uploads
        self.channel = grpc.aio.insecure_channel(self.target)
        self.stub = AdminStub(self.channel)
        self.registry = self.stub.ModelRegistry

    def _count(self) -> None:
        self.commits += 1

    async def stop(self) -> None:
        self.services.announce_stop()
        await self.channel.close()
        await self.server.stop(1.0)
        await self.services.stop()
        await self.database.aclose()
        self.store.close()

    async def register(self, name: str, **fields: Any) -> registry_pb2.Model:
        return await self.registry.RegisterModel(registry_pb2.RegisterModelRequest(name=name, **fields))

    async def upload(self, model: str, files: Mapping[str, bytes] | None = None, **fields: Any) -> Any:
        archive = pack(files or {"model.py": model.encode()})
        return await self.registry.UploadVersion(stream(archive, make_header(model, archive, **fields)))

    async def audit(self, **fields: Any) -> list[audit_pb2.AuditEntry]:
        """All entries that fit, the oldest first; they are read as somebody who may."""
        with everybody():
            answer = await self.stub.Audit.QueryAudit(audit_pb2.QueryAuditRequest(page_size=1000, **fields))
        return list(reversed(answer.entries))


class Gated:
    """A server whose calls know who makes them, as with the gate of a door, but without credentials."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Left out: the registered ones are found first."""

    def add_registered_method_handlers(self, service: str, methods: Mapping[str, RpcMethod]) -> None:
        enclosed = {name: self._enclose(f"/{service}/{name}", method) for name, method in methods.items()}
        self._server.add_registered_method_handlers(service, enclosed)
        self._server.add_generic_rpc_handlers((RpcService(service, enclosed),))

    def _enclose(self, path: str, method: RpcMethod) -> RpcMethod:
        def enter() -> None:
            principal = _PRINCIPAL[0]
            current_access.set(UNRESTRICTED if principal is None else Access(principal, TABLE[path]))

        async def answer(request: Any, context: Any) -> bytes:
            enter()
            return await (method.unary_unary or method.stream_unary)(request, context)

        async def answers(request: Any, context: Any) -> AsyncIterator[bytes]:
            enter()
            async with contextlib.aclosing(method.unary_stream(request, context)) as given:
                async for each in given:
                    yield each

        kinds = {"unary_unary": answer, "stream_unary": answer, "unary_stream": answers}
        return method._replace(**{name: call for name, call in kinds.items() if getattr(method, name) is not None})


_PRINCIPAL: list[Principal | None] = [None]


@contextlib.contextmanager
def speaking_as(name: str, *bindings: tuple[Role, str]) -> Iterator[None]:
    """Calls meanwhile are this caller's, who has these roles."""
    before = _PRINCIPAL[0]
    _PRINCIPAL[0] = Principal(name, bindings=tuple(RoleBinding(name, role, models) for role, models in bindings))
    try:
        yield
    finally:
        _PRINCIPAL[0] = before


@contextlib.contextmanager
def everybody() -> Iterator[None]:
    before, _PRINCIPAL[0] = _PRINCIPAL[0], None
    try:
        yield
    finally:
        _PRINCIPAL[0] = before


def pack(files: Mapping[str, bytes]) -> bytes:
    """A tar with these files."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def make_header(model: str, archive: bytes, **fields: Any) -> registry_pb2.UploadHeader:
    announced = {
        "upload_id": str(uuid.uuid4()),
        "format": registry_pb2.ARCHIVE_FORMAT_TAR,
        "size_bytes": len(archive),
        "sha256": hashlib.sha256(archive).hexdigest(),
    }
    return registry_pb2.UploadHeader(model=model, **{**announced, **fields})


def stream(archive: bytes, header: registry_pb2.UploadHeader, piece_bytes: int = 64 << 10) -> Iterable[Any]:
    """The messages of an upload from ``header.offset`` on."""
    yield registry_pb2.UploadVersionRequest(header=header)
    for begin in range(header.offset, len(archive), piece_bytes):
        yield registry_pb2.UploadVersionRequest(chunk=archive[begin : begin + piece_bytes])
