"""Calls as functions over a transaction: what is asked, what is changed, and what is written down about it.

A change is one transaction: the answer to an earlier call with the same idempotency key is looked for, the change is
made, its events, its audit entry and its answer are kept. A change that is refused leaves an audit entry, of its own or
of many (refusals.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiorch_proto.admin.v1.service import Method
from google.protobuf.message import Message

from aiorch_server.errors import AiorchError, RegistryUnavailable, ServerStopping
from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.details import find_code, find_model
from aiorch_server.frontends.admin.refusals import Refusals, Refused
from aiorch_server.registry.audit import append_audit
from aiorch_server.registry.idempotency import find_answer, keep_answer

if TYPE_CHECKING:
    from aiorch_server.registry.database import Database
    from aiorch_server.registry.session import Session

logger = logging.getLogger(__name__)

#: What the audit log shows of one text, one list and one request.
_MAX_TEXT: Final = 500
_MAX_ITEMS: Final = 50
_MAX_DETAIL: Final = 16_000
#: And of a refused one.
MAX_REFUSED: Final = 2_000
_KEY: Final = "idempotency_key"
_SECRET: Final = "secret"
#: Methods that change who may do what.
_ACCESS: Final = "/aiorch.admin.v1.Access/"
_Result = TypeVar("_Result")
#: (session, request, caller) -> response
Operation = Callable[["Session", Any, Caller], Any]


def is_change(method: Method) -> bool:
    """Whether a method changes something: exactly those take an idempotency key."""
    return _KEY in method.request.DESCRIPTOR.fields_by_name


class Transactions:
    """Runs operations in the database; on one event loop.

    ``server`` is this server's name in the audit log, ``on_commit`` is called on the loop after each change.
    ``settle_access`` is awaited after each change of who may do what, before it is answered.
    """

    def __init__(
        self,
        database: Database,
        *,
        server: str,
        on_commit: Callable[[], None],
        settle_access: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.database = database
        self._settle_access = settle_access
        self._server = server
        self._on_commit = on_commit
        self._running: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        self._refusals = Refusals(self._write_refusal)

    def bind(self, method: Method, operation: Operation) -> Callable[[Any, Any], Awaitable[Any]]:
        """The method as it is registered with a door, over what does it in a transaction."""
        if is_change(method):

            async def change(request: Any, context: Any) -> bytes:
                return await self.change(method, request, operation)

            return change

        async def ask(request: Any, context: Any) -> Any:
            caller = Caller.current()
            return await self.database.read(lambda session: operation(session, request, caller))

        return ask

    async def change(self, method: Method, request: Any, operation: Operation) -> bytes:
        """The serialized answer, once it is durable; the same bytes for the same request with the same key."""
        caller, key = Caller.current(), request.idempotency_key
        told, detail = write_request(method, request), write_detail(request)

        def work(session: Session) -> bytes:
            answer = find_answer(session, caller.name, key, told)
            if answer is not None:
                return answer
            response = operation(session, request, caller)
            answer = serialize(response)
            if _SECRET in response.DESCRIPTOR.fields_by_name:
                response.ClearField(_SECRET)
            keep_answer(session, caller.name, key, told, serialize(response))
            self.audit(session, method, caller, find_model(request), "OK", detail)
            return answer

        async def run() -> bytes:
            answer = await self.database.run(work)
            if self._settle_access is not None and method.path.startswith(_ACCESS):
                await self._settle_access()
            return answer

        return await self.finish(run())

    async def finish(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """What ``work`` gives; it goes on where the caller leaves, and ``on_commit`` is called when it is done."""
        if self._is_closed:
            work.close()
            raise ServerStopping("the server is stopping")
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._on_done)
        return await asyncio.shield(task)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is None:  # looked at: its caller may be gone
            self._on_commit()

    async def refuse(self, method: Method, request: Any, error: Exception) -> None:
        """Writes down that a change was refused; the log of the server tells where not even that was possible."""
        if not is_change(method) or request is None:
            return
        await self.refuse_as(method, find_model(request), write_detail(request, MAX_REFUSED), error)

    async def refuse_as(
        self, method: Method, model: str, detail: str, error: Exception, caller: Caller | None = None
    ) -> None:
        """As ``refuse``, for a change that is told by ``detail``; ``caller`` None: the one of this task."""
        if isinstance(error, RegistryUnavailable):
            return  # nothing was done, and nothing can be written down
        refused = Refused((caller or Caller.current()).name, method.path, find_code(error).name)
        if self._refusals.has_line(refused, model):
            await self._refusals.write(refused, model, detail)

    async def _write_refusal(self, refused: Refused, model: str, detail: str) -> None:
        try:
            await self.database.run(lambda session: self._append(session, refused, model, detail))
        except AiorchError as problem:
            logger.warning(
                "%s by '%s' was refused with %s, and the audit log was not written: %s",
                refused.method, refused.principal, refused.outcome, problem,
            )  # fmt: skip
            raise

    def audit(self, session: Session, method: Method, caller: Caller, model: str, outcome: str, detail: str) -> None:
        """Adds an entry to the audit log in this transaction."""
        self._append(session, Refused(caller.name, method.path, outcome), model, detail)

    def _append(self, session: Session, call: Refused, model: str, detail: str) -> None:
        append_audit(session, **call._asdict(), model=model, detail=detail, server=self._server)

    async def close(self, limit_s: float) -> None:
        """Takes no more changes, and waits for those under way; what is not done then is given up, and not made."""
        self._is_closed = True
        if self._running:
            _, late = await asyncio.wait(set(self._running), timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._refusals.close(limit_s)  # last: what was under way may have been refused


def write_request(method: Method, request: Any, *left_out: str) -> bytes:
    """What a request asks for, the same for the same request: without its key, and without the fields ``left_out``."""
    asked: Any = type(request)()
    asked.CopyFrom(request)
    for field in (_KEY, *left_out):
        asked.ClearField(field)
    told: bytes = method.path.encode() + b"\0" + serialize(asked)
    return told


def write_detail(request: Any, max_characters: int = _MAX_DETAIL) -> str:
    """A request as JSON for the audit log: without its key, long texts and lists cut."""
    fields: dict[str, Any] = _cut(request)
    fields.pop(_KEY, None)
    text = json.dumps(fields, separators=(",", ":"))
    if len(text) <= max_characters:
        return text
    short = {name: value for name, value in fields.items() if not isinstance(value, dict | list)}
    left_out = sorted(fields.keys() - short.keys())
    return json.dumps({**short, "left_out": left_out}, separators=(",", ":"))


def _cut(value: Any) -> Any:
    # not protobuf's own JSON, which refuses what the audit log must tell of: times and masks that are none
    if isinstance(value, Message):
        return {field.name: _cut_field(field, part) for field, part in value.ListFields()}
    if isinstance(value, bytes):
        return f"({len(value)} bytes)"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}... ({len(value)} characters)"
    if isinstance(value, list):
        more = [f"... ({len(value)} in all)"] if len(value) > _MAX_ITEMS else []
        return [_cut(each) for each in value[:_MAX_ITEMS]] + more
    if isinstance(value, dict):
        return {_cut(name): _cut(each) for name, each in list(value.items())[:_MAX_ITEMS]}
    return value


def _cut_field(field: Any, value: Any) -> Any:
    if field.type == field.TYPE_ENUM and not field.is_repeated:
        named = field.enum_type.values_by_number.get(value)
        return value if named is None else named.name
    if field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
        return _cut(dict(value))
    return _cut(list(value) if field.is_repeated else value)


def serialize(message: Any) -> bytes:
    """A message as bytes, the same for the same message."""
    return bytes(message.SerializeToString(deterministic=True))
