"""New versions: an archive that comes in pieces, checked, unpacked and stored, then recorded in one transaction.

The stream is read no faster than its pieces are written. What breaks off stays for a further stream with the same
``upload_id``; a further stream that comes while one is open takes over from it, because a client that was cut off does
not know how long its old stream seems open here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiorch_proto.admin.v1 import registry_pb2 as pb

from aiorch_server.errors import (
    AiorchError,
    Conflict,
    PreconditionFailed,
    QuotaExceeded,
    RegistryUnavailable,
    RequestError,
    StreamStalled,
)
from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.convert_models import encode_version
from aiorch_server.frontends.admin.fields import InvalidField, encode_time
from aiorch_server.frontends.admin.model_events import tell, tell_alias, tell_registered
from aiorch_server.frontends.admin.transactions import MAX_REFUSED, Transactions, serialize, write_detail
from aiorch_server.frontends.admin.upload_header import (
    UPLOAD_VERSION,
    Announced,
    build_upload,
    check_header,
    find_done,
)
from aiorch_server.registry import models, upload_rows, versions
from aiorch_server.registry.collect import LEASE_S, read_collections
from aiorch_server.registry.idempotency import LARGEST_ANSWER_BYTES, keep_answer
from aiorch_server.registry.names import not_registered
from aiorch_server.registry.uploads import Finished, Upload, Uploads

if TYPE_CHECKING:
    from aiorch_server.registry.session import Session

logger = logging.getLogger(__name__)

MAX_CHUNK_BYTES: Final = 4 << 20
#: Streams at a time, threads that write for them, and how long a stream waits for its client.
MAX_STREAMS: Final = 64
_THREADS: Final = 4
PATIENCE_S: Final = 120.0
#: How often files are stored anew because some were deleted meanwhile; how long the end of a deletion is waited for.
_MOST_STORES: Final = 5
QUIET_PATIENCE_S: Final = LEASE_S + 5.0
_LOOK_S: Final = 0.2
_Result = TypeVar("_Result")


class _Claim:
    """A stream's right to add to its upload, until another stream takes it."""

    def __init__(self) -> None:
        self._is_lost = False
        self._scope: asyncio.Timeout | None = None

    def lose(self) -> None:
        """The stream ends with Conflict, at once where it waits for its client."""
        self._is_lost = True
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def receive(self, messages: AsyncIterator[Any], patience_s: float) -> Any:
        """The next message, None after the last."""
        self._check()
        try:
            async with asyncio.timeout(patience_s) as self._scope:
                message = await anext(messages, None)
        except TimeoutError:
            self._check()
            raise StreamStalled(
                f"no piece came for {patience_s:g} s; what came stays: go on with the same upload_id"
            ) from None
        finally:
            self._scope = None
        self._check()
        return message

    def _check(self) -> None:
        if self._is_lost:
            raise Conflict("another stream of this upload has taken over")


class UploadService:
    """UploadVersion and GetUpload; from ``start`` on, on one event loop, blocking work on threads of its own."""

    _uploads: Uploads

    def __init__(
        self,
        transactions: Transactions,
        lifetime_s: float,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._transactions = transactions
        self._database = transactions.database
        self._lifetime_s = lifetime_s
        self._patience_s = patience_s
        self._claims: dict[tuple[str, str], _Claim] = {}
        self._writing: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._finishing: dict[tuple[str, str, str], asyncio.Task[bytes]] = {}
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="aiorch-upload")

    def start(self, uploads: Uploads) -> None:
        """From now on pieces go to ``uploads``."""
        self._uploads = uploads

    async def get(self, request: Any, context: Any) -> pb.Upload:
        """How far an upload is."""
        row = await self._database.read(
            lambda session: upload_rows.get_upload(session, request.model, request.upload_id)
        )
        received = row.size_bytes
        if not row.version:
            received = await self._run(self._uploads.received_bytes, build_upload(row))
        message = pb.Upload(
            model=row.model,
            upload_id=row.upload_id,
            size_bytes=row.size_bytes,
            received_bytes=received,
            version=row.version,
        )
        encode_time(row.expires_at, message.expires_at)
        return message

    async def take(self, messages: AsyncIterator[Any], context: Any) -> bytes:
        """The serialized version that the stream's archive became."""
        caller, claim, header = Caller.current(), _Claim(), None
        try:
            first = await claim.receive(messages, self._patience_s)
            if first is None or first.WhichOneof("part") != "header":
                raise InvalidField("header", "is missing; it is the first message of the stream")
            header = first.header
            announced = check_header(header, caller)
            done, upload = await self._begin(announced)
            if upload is None:
                return done
            if announced.owned_key not in self._finishing:
                with self._claiming(announced.key, claim):
                    await self._receive(upload, announced, claim, messages)
            caller.require_model(header.model)  # an upload takes long, and roles may have been taken away meanwhile
            return await self._finish(upload, announced)
        except Exception as error:
            if header is not None:
                await self._transactions.refuse_as(
                    UPLOAD_VERSION, header.model, write_detail(header, MAX_REFUSED), error
                )
            raise

    async def _begin(self, announced: Announced) -> tuple[bytes, Upload | None]:
        """The upload to add to; the answer where it was given before."""
        header, caller = announced.header, announced.caller

        def look(session: Session) -> tuple[bytes | None, tuple[Upload, ...]]:
            done = find_done(session, announced)
            if done is None and not header.create_model and not models.has(session, header.model):
                raise not_registered(header.model)
            others = upload_rows.read_open_uploads(session, caller.name)
            return done, tuple(build_upload(row) for row in others if (row.model, row.upload_id) != announced.key)

        done, others = await self._database.read(look)
        if done is not None:
            return done, None
        planned = await self._run(
            lambda: self._uploads.begin(
                model=header.model,
                upload_id=announced.upload_id,
                principal=caller.name,
                format=announced.format,
                size_bytes=header.size_bytes,
                sha256=header.sha256,
                now=datetime.now(UTC),
                open_uploads=others,
            )
        )

        def begin(session: Session) -> upload_rows.Upload:
            return upload_rows.begin_upload(
                session,
                planned.model,
                planned.upload_id,
                archive_format=planned.format.value,
                size_bytes=planned.size_bytes,
                sha256=planned.sha256,
                actor=planned.principal,
                expiry_s=self._lifetime_s,
            )

        return b"", build_upload(await self._database.run(begin))

    @contextmanager
    def _claiming(self, key: tuple[str, str], claim: _Claim) -> Iterator[None]:
        """The stream with ``claim`` is the one that adds to the upload."""
        before = self._claims.pop(key, None)
        if before is not None:
            before.lose()
        elif len(self._claims) >= MAX_STREAMS:
            raise QuotaExceeded(f"{MAX_STREAMS} uploads are under way at this server: try again, or at another one")
        self._claims[key] = claim
        try:
            yield
        finally:
            if self._claims.get(key) is claim:
                del self._claims[key]

    async def _receive(self, upload: Upload, announced: Announced, claim: _Claim, messages: AsyncIterator[Any]) -> None:
        """Adds all pieces of the stream; the next is not asked for before the last is written."""
        offset = announced.header.offset
        while (message := await claim.receive(messages, self._patience_s)) is not None:
            chunk = message.chunk
            if message.WhichOneof("part") != "chunk":
                raise InvalidField("chunk", "is missing; all messages but the first are pieces of the archive")
            if len(chunk) > MAX_CHUNK_BYTES:
                raise InvalidField("chunk", f"has {len(chunk)} bytes; expected at most {MAX_CHUNK_BYTES}")
            await self._write(announced.key, self._append, upload, offset, chunk)
            offset += len(chunk)

    async def _write(self, key: tuple[str, str], append: Callable[..., None], *arguments: Any) -> None:
        """Runs ``append`` on a thread, behind that of a stream that was cut off while it wrote."""
        before = self._writing.get(key)
        if before is not None:
            await asyncio.wait((before,))
        writing = asyncio.get_running_loop().run_in_executor(self._executor, append, *arguments)
        self._writing[key] = writing
        writing.add_done_callback(lambda writing: self._end_write(key, writing))
        await asyncio.shield(writing)

    def _end_write(self, key: tuple[str, str], writing: asyncio.Future[None]) -> None:
        if self._writing.get(key) is writing:  # two may have waited for the same one
            del self._writing[key]
        if not writing.cancelled():
            writing.exception()  # looked at: its stream may be gone

    def _append(self, upload: Upload, offset: int, chunk: bytes) -> None:
        self._uploads.append(upload, offset, chunk, now=datetime.now(UTC))

    async def _finish(self, upload: Upload, announced: Announced) -> bytes:
        """The answer, once the version is durable; goes on where the client leaves, once for all streams."""
        task = self._finishing.get(announced.owned_key)
        if task is None:
            work = self._make_version(upload, announced)
            task = self._finishing[announced.owned_key] = asyncio.create_task(self._transactions.finish(work))
            task.add_done_callback(lambda task: self._forget(announced.owned_key, task))
        return await asyncio.shield(task)

    def _forget(self, key: tuple[str, str, str], task: asyncio.Task[bytes]) -> None:
        del self._finishing[key]
        if not task.cancelled():
            task.exception()  # looked at: its client may be gone

    async def _make_version(self, upload: Upload, announced: Announced) -> bytes:
        for _ in range(_MOST_STORES):
            collections = await self._await_quiet()
            answer = await self._try_version(upload, announced, collections)
            if answer is not None:
                return answer
        raise _defer("files that no version needs were deleted while these were stored")

    async def _await_quiet(self) -> int:
        """``read_collections``, once nothing is being deleted."""
        deadline = asyncio.get_running_loop().time() + QUIET_PATIENCE_S
        while (collections := await self._database.read(read_collections)) is None:
            if asyncio.get_running_loop().time() > deadline:
                raise _defer("files that no version needs are being deleted from the store")
            await asyncio.sleep(_LOOK_S)
        return collections

    async def _try_version(self, upload: Upload, announced: Announced, collections: int) -> bytes | None:
        """The answer; None where anything was deleted since ``collections``, and the files may be gone."""
        try:
            finished = await self._run(self._finish_on_thread, upload)
        except AiorchError as error:
            # it may be done by now, through another stream, and its pieces be gone for that
            done = await self._database.read(lambda session: find_done(session, announced))
            if done is not None:
                return done
            if isinstance(error, RequestError) and not isinstance(error, PreconditionFailed | Conflict):
                await self._database.run(lambda session: upload_rows.drop_upload(session, *announced.key))
            raise
        answer = await self._database.run(lambda session: self._record(session, announced, finished, collections))
        if answer is None:
            return None
        try:
            await self._run(self._uploads.drop, upload)
        except AiorchError as error:
            logger.warning("the pieces of a finished upload of %s stay until they expire: %s", upload.model, error)
        return answer

    def _finish_on_thread(self, upload: Upload) -> Finished:
        return self._uploads.finish(upload, now=datetime.now(UTC))

    def _record(self, session: Session, announced: Announced, finished: Finished, collections: int) -> bytes | None:
        """The version with all that goes with it, in one transaction; None, and no change, as ``_try_version``."""
        done = find_done(session, announced)
        if done is not None:
            return done
        if read_collections(session) != collections:
            return None
        header, caller = announced.header, announced.caller
        upload_rows.get_upload(session, *announced.key)
        is_new = not models.has(session, header.model)
        added = versions.add_version(
            session,
            header.model,
            finished.manifest,
            announced.provenance,
            actor=caller.name,
            has_code=finished.has_code,
            create_model=header.create_model,
            point_aliases=header.aliases,
        )
        upload_rows.advance_upload(
            session, *announced.key, version=added.version, received_bytes=header.size_bytes
        )  # fmt: skip
        if is_new:
            tell_registered(session, caller, added.model)
        text = f"version {added.version} of model {added.model} was uploaded"
        tell(session, "version.uploaded", text, caller, added.model, added.version)
        for alias in header.aliases:
            tell_alias(session, caller, added.model, alias, added.version)
        answer = serialize(encode_version(added))
        if len(answer) <= LARGEST_ANSWER_BYTES:  # a longer one is found by its upload's id
            keep_answer(session, caller.name, header.idempotency_key, announced.told, answer)
        self._transactions.audit(session, UPLOAD_VERSION, caller, added.model, "OK", announced.detail)
        return answer

    async def _run(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)

    def close(self) -> None:
        """Takes no more work; what is under way on threads ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _defer(reason: str) -> RegistryUnavailable:
    error = RegistryUnavailable(f"{reason}; go on with the same upload_id, nothing need be sent again")
    error.told = str(error)
    return error
