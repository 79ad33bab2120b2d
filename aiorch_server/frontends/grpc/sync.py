"""Servicers that are plain functions: they run on threads and see the blocking interface of grpc."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn, TypeVar

import grpc

from aiorch_server.frontends.grpc.context import Metadata, ServicerContext

_Result = TypeVar("_Result")


class SyncServicerContext(grpc.ServicerContext):  # type: ignore[misc]
    """One RPC as a servicer on a thread sees it; what must happen on the loop is passed there and waited for."""

    def __init__(self, context: ServicerContext, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop

    def wait_for(self, awaitable: Awaitable[_Result]) -> _Result:
        """Runs ``awaitable`` on the loop and gives its result to this thread."""

        async def run() -> _Result:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def is_active(self) -> bool:
        """Whether the client still waits."""
        return not self._context.done()

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, None without one."""
        return self._context.time_remaining()

    def cancel(self) -> None:
        """Ends the RPC with CANCELLED when the servicer returns."""
        self._context.set_code(grpc.StatusCode.CANCELLED)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """``callback()`` runs when the RPC is done; False (and never) if it is done already."""
        if self._context.done():
            return False
        self._context.add_done_callback(lambda _: callback())
        return True

    def invocation_metadata(self) -> Any:
        """See ``ServicerContext.invocation_metadata``."""
        return self._context.invocation_metadata()

    def peer(self) -> str:
        """See ``ServicerContext.peer``."""
        return self._context.peer()

    def peer_identities(self) -> list[bytes] | None:
        """See ``ServicerContext.peer_identities``."""
        return self._context.peer_identities()

    def peer_identity_key(self) -> str | None:
        """See ``ServicerContext.peer_identity_key``."""
        return self._context.peer_identity_key()

    def auth_context(self) -> Any:
        """See ``ServicerContext.auth_context``."""
        return self._context.auth_context()

    def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """Sends the response headers, at most once and before the first message."""
        self.wait_for(self._context.send_initial_metadata(initial_metadata))

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """Metadata that is sent with the status."""
        self._context.set_trailing_metadata(trailing_metadata)

    def trailing_metadata(self) -> Metadata:
        """The metadata that was set, empty before."""
        return self._context.trailing_metadata()

    def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata = ()) -> NoReturn:
        """Ends the RPC with a status that is not OK; always raises the same as there."""
        self._context.set_abort(code, details, trailing_metadata)
        raise self._context.abort_error("Locally aborted.")

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """As ``abort``, with the status as one object."""
        self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_code(self, code: grpc.StatusCode) -> None:
        """The status code for when the servicer returns."""
        self._context.set_code(code)

    def set_details(self, details: str) -> None:
        """The status text for when the servicer returns."""
        self._context.set_details(details)

    def code(self) -> Any:
        """The code that was set, None before."""
        return self._context.code()

    def details(self) -> str:
        """The text that was set, empty before."""
        return self._context.details()

    def set_compression(self, compression: grpc.Compression) -> None:
        """See ``ServicerContext.set_compression``."""
        self._context.set_compression(compression)

    def disable_next_message_compression(self) -> None:
        """See ``ServicerContext.disable_next_message_compression``."""
        self._context.disable_next_message_compression()


class SyncRequestIterator(Iterator[Any]):
    """The requests of a stream for a thread: ``next`` blocks until one has come."""

    def __init__(self, context: ServicerContext, sync_context: SyncServicerContext) -> None:
        self._context = context
        self._sync_context = sync_context

    def __next__(self) -> Any:
        message = self._sync_context.wait_for(self._context.read())
        if message is self._context.end:
            raise StopIteration
        return message
