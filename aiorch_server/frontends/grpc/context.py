"""What a servicer is given beside its request: the native door's forms of grpc.aio's and grpc's ServicerContext."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

from aiorch_server.errors import Code
from aiorch_server.frontends.grpc.compression import WBITS, ResponseCompression, choose_encoding, pack_message
from aiorch_server.frontends.grpc.credentials import (
    AuthContext,
    describe_peer,
    find_identity_key,
    find_peer_certificate,
)
from aiorch_server.frontends.grpc.metadata import (
    HeaderPairs,
    MalformedMetadata,
    Metadatum,
    decode_metadata,
    encode_metadata,
)
from aiorch_server.frontends.unpacking import LARGEST_RATIO, UnpackBudget

if TYPE_CHECKING:
    import grpc

    from aiorch_server._core import Call

logger = logging.getLogger(__name__)

Metadata = Iterable[tuple[str, str | bytes]]

#: From this size on a message is unpacked on another thread: less takes the loop a few milliseconds at worst.
_LARGE_COMPRESSED_BYTES: Final = 4096
_MORE_REQUESTS: Final = "A unary call carries exactly one request message, received more"
_OVER: Final = "the RPC is over: its client is gone, its deadline has passed, or it was answered"


class AbortError(Exception):
    """What ``abort`` raises; grpc.aio has one of the same name."""


class UsageError(Exception):
    """Something was asked of a call or server that is over; grpc.aio has one of the same name."""


class CallFailed(Exception):
    """Ends a call with this status; raised by the door itself, never by servicers."""

    def __init__(self, code: Code, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


def decompress(message: bytes, encoding: str, max_bytes: int) -> bytes:
    """Unpacks one message; raises CallFailed where it is broken or unpacks to more than ``max_bytes``."""
    unpacker = zlib.decompressobj(wbits=WBITS[encoding])
    try:
        plain = unpacker.decompress(message, max_bytes + 1)
    except zlib.error:
        raise CallFailed(Code.INTERNAL, f"a message is not valid {encoding} data") from None
    if len(plain) > max_bytes:
        text = f"Received message larger than max (more than {max_bytes} bytes after decompression vs. {max_bytes})"
        raise CallFailed(Code.RESOURCE_EXHAUSTED, text)
    if not unpacker.eof:
        raise CallFailed(Code.INTERNAL, f"a message ends in the middle of its {encoding} data")
    if unpacker.unused_data:
        raise CallFailed(Code.INTERNAL, f"a message goes on behind the end of its {encoding} data")
    return plain


class ServicerContext:
    """One RPC as an asynchronous servicer sees it; https://grpc.github.io/grpc/python/grpc_asyncio.html.

    All methods belong to the loop's thread. Reading or writing when the RPC is over raises ``usage_error``; the
    servicer's task is cancelled at that moment anyway. ``embedded.GrpcServicerContext`` is the form for servicers that
    know grpc: it raises and gives what grpc.aio does.
    """

    abort_error: ClassVar[type[Exception]] = AbortError
    usage_error: ClassVar[type[Exception]] = UsageError
    #: What ``read`` gives after the last message.
    end: ClassVar[Any] = object()

    def __init__(
        self,
        call: Call,
        deserialize: Callable[[bytes], Any] | None,
        serialize: Callable[[Any], bytes] | None,
        max_message_bytes: int,
        budget: UnpackBudget,
        compression: ResponseCompression,
    ) -> None:
        self._call = call
        self._deserialize = deserialize
        self._serialize = serialize
        self._max_message_bytes = max_message_bytes
        self._budget = budget
        self._unpacked_bytes = 0
        self._compression = compression.algorithm
        self._min_compress_bytes = compression.min_compress_bytes
        self._is_next_plain = False
        self._code: grpc.StatusCode | int | None = None
        self._details = ""
        self._trailing_metadata: Metadata = ()
        self._invocation_metadata: tuple[Metadatum, ...] | None = None
        self._auth_context: AuthContext | None = None
        self._done_callbacks: list[Callable[[Any], None]] = []
        self._is_finished = False

    # ------------------------------------------------------------------------------------------------- messages

    async def receive(self) -> bytes | None:
        """The next request message as bytes, None after the last; raises CallFailed where it cannot be unpacked."""
        self._give_back_unpacked()
        while True:
            received = self._call.take_message()
            if received is not None:
                message, is_compressed = received
                if not is_compressed:
                    return message
                return await self._unpack(message)
            self._ensure_open()
            if self._call.is_half_closed:
                return None
            await self._call.wait_readable()

    async def _unpack(self, message: bytes) -> bytes:
        """A compressed message as it was; its bytes are reserved until the next is asked for, or the call is over."""
        most = min(self._max_message_bytes, len(message) * LARGEST_RATIO)
        try:
            await self._budget.reserve(most)
        except TimeoutError:
            text = "Other compressed messages take all the memory there is for unpacking"
            raise CallFailed(Code.RESOURCE_EXHAUSTED, text) from None
        self._unpacked_bytes = most
        arguments = (message, self._call.encoding, self._max_message_bytes)
        if len(message) < _LARGE_COMPRESSED_BYTES:
            plain = decompress(*arguments)
        else:
            plain = await asyncio.to_thread(decompress, *arguments)
        self._give_back_unpacked(len(plain))
        return plain

    def _give_back_unpacked(self, kept_bytes: int = 0) -> None:
        released, self._unpacked_bytes = self._unpacked_bytes - kept_bytes, kept_bytes
        if released > 0:
            self._budget.release(released)

    async def read(self) -> Any:
        """The next request message, ``end`` after the last."""
        message = await self.receive()
        if message is None:
            return self.end
        return message if self._deserialize is None else self._deserialize(message)

    async def expect_end(self) -> None:
        """Waits until the client has ended its side; CallFailed when another message comes instead."""
        while self._call.take_message() is None:
            self._ensure_open()
            if self._call.is_half_closed:
                return
            await self._call.wait_readable()
        raise CallFailed(Code.UNIMPLEMENTED, _MORE_REQUESTS)

    async def send(self, message: Any) -> None:
        """Serializes, packs and queues a response message, however many are unsent."""
        self._ensure_open()
        if self._serialize is not None:
            message = self._serialize(message)
        if message is None:
            message = b""
        is_plain, self._is_next_plain = self._is_next_plain, False
        encoding = choose_encoding(self._compression, self._call.accepted)
        if encoding is None:
            self._call.send_message(message)
            return
        if not self._call.has_begun:
            self._call.send_initial_metadata([(b"grpc-encoding", encoding.encode())])
        packed = None
        if not is_plain and len(message) >= self._min_compress_bytes:
            packed = await pack_message(message, encoding)
        self._call.send_message(message if packed is None else packed, packed is not None)

    async def write(self, message: Any) -> None:
        """Sends a response message; waits while the client takes too little."""
        await self.send(message)
        while self._call.is_congested:
            await self._call.wait_writable()

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """Sends the response headers, at most once and before the first message."""
        self._ensure_open()
        encoding = choose_encoding(self._compression, self._call.accepted)
        pairs = [*_encode(initial_metadata), *([(b"grpc-encoding", encoding.encode())] if encoding else [])]
        self._call.send_initial_metadata(pairs)

    def _ensure_open(self) -> None:
        if self._call.is_over or self._is_finished:
            raise self.usage_error(_OVER)

    # --------------------------------------------------------------------------------------------------- status

    async def abort(self, code: grpc.StatusCode | int, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """Ends the RPC with a status that is not OK; always raises ``abort_error``."""
        self.set_abort(code, details, trailing_metadata)
        raise self.abort_error("Locally aborted.")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """As ``abort``, with the status as one object."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_abort(self, code: grpc.StatusCode | int, details: str, trailing_metadata: Metadata) -> None:
        """Sets what ``abort`` ends the RPC with."""
        if _number(code) == 0:
            code, details = Code.UNKNOWN, f"abort was called with OK: {details}"
        self._code, self._details = code, details
        if trailing_metadata:
            self._trailing_metadata = trailing_metadata

    def set_code(self, code: grpc.StatusCode | int) -> None:
        """The status code for when the servicer returns."""
        self._code = code

    def set_details(self, details: str) -> None:
        """The status text for when the servicer returns."""
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """Metadata that is sent with the status."""
        self._trailing_metadata = trailing_metadata

    def code(self) -> grpc.StatusCode | int | None:
        """The code that was set, None before."""
        return self._code

    def details(self) -> str:
        """The text that was set, empty before."""
        return self._details

    def trailing_metadata(self) -> Metadata:
        """The metadata that was set, empty before."""
        return self._trailing_metadata

    @property
    def is_ok(self) -> bool:
        """Whether nobody has set another status than OK."""
        return _number(self._code) == 0

    def finish(self) -> None:
        """Answers with the status that was set, once; then runs the done callbacks, each guarded alone."""
        if self._is_finished:
            return
        self._give_back_unpacked()
        try:
            trailing = _encode(self._trailing_metadata)
        except CallFailed as failure:
            trailing, self._code, self._details = [], failure.code, failure.details
        self._call.finish(_number(self._code), str(self._details or ""), trailing)
        self._is_finished = True
        for callback in self._done_callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("a done callback of %s failed", self._call.path)

    # ------------------------------------------------------------------------------------------------- the call

    def invocation_metadata(self) -> tuple[Metadatum, ...]:
        """What the client sent, in order, duplicates kept; values of names ending in ``-bin`` are bytes."""
        if self._invocation_metadata is None:
            try:
                self._invocation_metadata = decode_metadata(self._call.metadata)
            except MalformedMetadata as error:
                raise CallFailed(Code.INVALID_ARGUMENT, str(error)) from None
        return self._invocation_metadata

    @property
    def choice(self) -> tuple[int, bool] | None:
        """The version that the compiled path chose for a request which it did not carry; see shares.pxd."""
        return self._call.choice

    def peer(self) -> str:
        """The client's address, for example ``ipv4:127.0.0.1:50000``."""
        return self._call.peer

    def peer_identities(self) -> list[bytes] | None:
        """The names that the client's certificate proves, None without one."""
        key = self.peer_identity_key()
        return None if key is None else list(self.auth_context()[key])

    def peer_identity_key(self) -> str | None:
        """Which property of ``auth_context`` holds the identity, None without one."""
        return find_identity_key(self.auth_context())

    def auth_context(self) -> AuthContext:
        """Properties of the connection's security, named as gRPC names them."""
        if self._auth_context is None:
            self._auth_context = describe_peer(self._call)
        return self._auth_context

    def peer_certificate(self) -> bytes:
        """The client's certificate in DER, empty without one; the handshake has proved and checked it."""
        return find_peer_certificate(self._call) or b""

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, None without one."""
        return self._call.time_remaining()

    def cancelled(self) -> bool:
        """Whether the RPC ended before the servicer did."""
        return self._call.is_over

    def done(self) -> bool:
        """Whether the RPC is answered or over."""
        return self._is_finished or self._call.is_over

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """``callback(context)`` runs when the servicer has returned and the status is sent."""
        self._done_callbacks.append(callback)

    def set_compression(self, compression: int) -> None:
        """What the messages are packed with, if the client takes that. RuntimeError once the headers are sent."""
        if self._call.has_begun:
            raise RuntimeError("Compression setting must be specified before sending initial metadata")
        self._compression = compression

    def disable_next_message_compression(self) -> None:
        """The next message goes as it is."""
        self._is_next_plain = True


def _encode(metadata: Metadata) -> HeaderPairs:
    try:
        return encode_metadata(metadata)
    except (TypeError, ValueError) as error:  # InvalidMetadata, or no pairs at all
        logger.error("a servicer set metadata that cannot be sent: %s", error)
        raise CallFailed(Code.INTERNAL, "Invalid metadata") from None


def _number(code: Any) -> int:
    """What a servicer set as gRPC's number; UNKNOWN where it is none."""
    if code is None:
        return 0
    number = getattr(code, "value", code)
    if isinstance(number, tuple):  # grpc.StatusCode's values are pairs
        number = number[0]
    return number if isinstance(number, int) and 0 <= number <= 16 else Code.UNKNOWN
