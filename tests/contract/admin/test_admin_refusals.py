"""Refused changes are written down, and cannot fill the audit log."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest
from admin_site import Site, refused, speaking_as
from aiorch_proto.admin.v1 import access_pb2, registry_pb2
from aiorch_proto.admin.v1.service import METHODS

from aiorch_server.errors import RegistryUnavailable, RequestError
from aiorch_server.frontends.admin import refusals
from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.refusals import BURST, OTHERS, SEVERAL, Refusals, Refused
from aiorch_server.frontends.admin.transactions import Transactions
from aiorch_server.registry.audit import query_audit
from aiorch_server.registry.audit_check import verify_audit
from aiorch_server.security.access import Access
from aiorch_server.security.identity import Principal
from aiorch_server.security.roles import Role

REFUSED = Refused("eve", "/m", "PERMISSION_DENIED")
TIMEOUT_S = 20.0


class Log:
    """Lines as (kind, model, how many refusals they tell of); fails as often as ``failures`` says."""

    def __init__(self) -> None:
        self.lines: list[tuple[Refused, str, int]] = []
        self.details: list[dict[str, Any]] = []
        self.failures = 0
        self.written = asyncio.Event()

    async def write(self, refused: Refused, model: str, detail: str) -> None:
        self.written.set()
        if self.failures:
            self.failures -= 1
            raise RegistryUnavailable("away")
        self.details.append(json.loads(detail))
        self.lines.append((refused, model, self.details[-1]["refused_again"]))

    async def wait(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.written.wait()
        self.written.clear()


async def test_a_flood_is_a_few_lines(site: Site) -> None:
    with speaking_as("eve", (Role.VIEWER, "*")):
        for number in range(60):
            labels = {f"l{index}": "x" * 500 for index in range(20)}
            request = registry_pb2.RegisterModelRequest(name=f"m{number}", labels=labels)
            error, _ = await refused(site.registry.RegisterModel(request))
            assert error.code().name == "PERMISSION_DENIED"
    with speaking_as("eve", (Role.DEPLOYER, "*")):
        await site.register("digits")
    with speaking_as("mallory", (Role.VIEWER, "*")):
        await refused(site.register("digits"))
    entries = await site.audit()
    assert [(each.principal, each.outcome, each.model) for each in entries] == [
        *(("eve", "PERMISSION_DENIED", f"m{number}") for number in range(BURST)),
        ("eve", "OK", "digits"),
        ("mallory", "PERMISSION_DENIED", "digits"),
    ]
    assert max(len(each.detail) for each in entries) < 2_000
    await site.services._transactions.close(TIMEOUT_S)
    page = await site.database.read(lambda session: query_audit(session, principal="eve", size=100))
    assert len(page.items) == BURST + 2
    last = page.items[0]
    told = json.loads(last.detail)
    assert (last.outcome, last.model, told["refused_again"], len(told["models"])) == ("PERMISSION_DENIED", "", 50, 10)
    assert (await verify_audit(site.database)).is_intact


def use_up(counted: Refusals, refused: Refused = REFUSED) -> None:
    assert [counted.has_line(refused, "a") for _ in range(BURST)] == [True] * BURST


async def test_windows_grow_while_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    counted = Refusals(log.write, window_s=0.01, longest_s=0.05)
    use_up(counted)
    for _ in range(5):
        while counted.has_line(REFUSED, "b"):  # a line comes back with each window
            pass
        await log.wait()
        await asyncio.sleep(0)
    assert log.lines == [(REFUSED, "b", 1)] * 5
    assert counted._callers["eve"].length_s == 0.05
    async with asyncio.timeout(TIMEOUT_S):
        while counted._callers:  # some quiet windows, and it is forgotten
            await asyncio.sleep(0.01)
    use_up(counted)
    await counted.close(1.0)
    assert len(log.lines) == 5


async def test_what_cannot_be_written_is_told_later() -> None:
    log = Log()
    log.failures = 2
    counted = Refusals(log.write, window_s=0.01)
    use_up(counted)
    calls = [(REFUSED, "a"), (REFUSED._replace(method="/n"), "b"), (REFUSED._replace(outcome="NOT_FOUND"), "c")]
    assert [counted.has_line(*call) for call in calls] == [False] * 3
    for _ in range(3):
        await log.wait()
    await asyncio.sleep(0)
    assert log.lines == [(Refused("eve", SEVERAL, SEVERAL), "", 3)]
    assert log.details[0]["models"] == {"a": 1, "b": 1, "c": 1}
    assert log.details[0]["calls"] == {"/m PERMISSION_DENIED": 1, "/n PERMISSION_DENIED": 1, "/m NOT_FOUND": 1}
    await counted.close(1.0)


async def test_many_callers_share_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "MAX_CALLERS", 3)
    log = Log()
    counted = Refusals(log.write)
    firsts = [counted.has_line(REFUSED._replace(principal=f"p{number}"), "a") for number in range(50)]
    assert firsts == [True] * 3 + [False] * 47
    assert len(counted._callers) == 4
    await counted.close(1.0)
    assert log.lines == [(REFUSED._replace(principal=OTHERS), "a", 47)]


async def test_a_log_that_hangs_does_not_hold_up_the_end() -> None:
    async def hang(refused: Refused, model: str, detail: str) -> None:
        await asyncio.Event().wait()

    counted = Refusals(hang)
    use_up(counted)
    assert not counted.has_line(REFUSED, "a")
    async with asyncio.timeout(TIMEOUT_S):
        await counted.close(0.05)


async def test_the_end_tells_how_long_it_was_counted_and_what_came_back_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A line that is being written when the end comes, and fails, is told with the rest."""
    gate, begun, lines = asyncio.Event(), asyncio.Event(), []

    async def write(refused: Refused, model: str, detail: str) -> None:
        begun.set()
        await gate.wait()
        if len(lines) < 1:
            lines.append("failed")
            raise RegistryUnavailable("away")
        lines.append(json.loads(detail))

    counted = Refusals(write, window_s=0.05)
    use_up(counted)
    assert not counted.has_line(REFUSED, "a")
    await asyncio.wait_for(begun.wait(), TIMEOUT_S)
    counted._window_s = counted._callers["eve"].length_s = 60.0
    while counted.has_line(REFUSED, "b"):
        pass
    close = asyncio.create_task(counted.close(TIMEOUT_S))
    await asyncio.sleep(0)
    gate.set()
    await close
    assert [each if isinstance(each, str) else each["refused_again"] for each in lines] == ["failed", 2]
    assert lines[1]["within_s"] < 50
    assert "in no line" not in caplog.text
    lines.clear()
    assert not counted.has_line(REFUSED, "c")
    await counted.close(TIMEOUT_S)
    assert "1 refused changes are in no line of the audit log" in caplog.text


class Slow:
    """A database whose calls wait for ``gate``; it keeps what was written."""

    def __init__(self) -> None:
        self.gate, self.begun, self.calls = asyncio.Event(), asyncio.Event(), 0

    async def run(self, work: Any) -> None:
        self.begun.set()
        await self.gate.wait()
        self.calls += 1


async def test_a_line_is_written_though_its_caller_left() -> None:
    slow = Slow()
    transactions = Transactions(cast(Any, slow), server="s", on_commit=lambda: None)
    caller, method = Caller("eve", Access(Principal("eve"))), METHODS["/aiorch.admin.v1.Deployments/Deploy"]
    call = asyncio.create_task(transactions.refuse_as(method, "m", "{}", RequestError("no"), caller))
    await asyncio.wait_for(slow.begun.wait(), TIMEOUT_S)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    close = asyncio.create_task(transactions.close(TIMEOUT_S))
    await asyncio.sleep(0)
    slow.gate.set()
    await asyncio.wait_for(close, TIMEOUT_S)
    assert slow.calls == 1


async def test_what_is_refused_while_the_end_waits_for_it_is_told() -> None:
    slow = Slow()
    transactions = Transactions(cast(Any, slow), server="s", on_commit=lambda: None)
    caller, method = Caller("eve", Access(Principal("eve"))), METHODS["/aiorch.admin.v1.Deployments/Deploy"]
    use_up(transactions._refusals, Refused("eve", method.path, "INVALID_ARGUMENT"))
    goes_on = asyncio.Event()

    async def work() -> None:
        await goes_on.wait()
        raise RequestError("no")

    async def call() -> None:
        try:
            await transactions.finish(work())
        except RequestError as error:
            await transactions.refuse_as(method, "m", "{}", error, caller)

    calls = [asyncio.create_task(call()) for _ in range(BURST + 1)]
    await asyncio.sleep(0)
    close = asyncio.create_task(transactions.close(TIMEOUT_S))
    await asyncio.sleep(0)
    slow.gate.set()
    goes_on.set()
    await asyncio.wait_for(asyncio.gather(*calls, close), TIMEOUT_S)
    assert slow.calls == 1, "one line that counts them all"


async def test_names_cannot_write_lines(site: Site) -> None:
    """Control characters, endless names: they are one field of one line, as JSON or cut."""
    for name in ('x\n{"outcome":"OK"}\r\x1b[2J', "n" * 100_000, "\u2028\u202e"):
        with speaking_as("eve", (Role.ADMIN, "*")):
            request = access_pb2.GrantRoleRequest(principal=name, role=access_pb2.ROLE_ADMIN, models=name)
            await refused(site.stub.Access.GrantRole(request))
    entries = await site.audit()
    assert len(entries) == 3
    for entry in entries:
        assert entry.detail.isascii() and entry.detail.isprintable() and len(entry.detail) < 3000
    assert (await verify_audit(site.database)).is_intact
