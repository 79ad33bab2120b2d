"""What the compiled door lets through once the gate has seen it, and what ends that; quotas on both planes."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from secured import DOORS, INFER, KEYS, TIMEOUT_S, Secured, serve_secured

NATIVE = [door for door in DOORS if door != "grpcio"]


def count_gate(site: Secured) -> list[str]:
    """The calls that the gate is asked about from now on."""
    gate: Any = site.application._gate
    asked: list[str] = []
    enter = gate.enter

    async def note(call: str, credentials: Any) -> Any:
        asked.append(call)
        return await enter(call, credentials)

    gate.enter = note
    return asked


@pytest.mark.parametrize("door", NATIVE)
async def test_the_gate_is_asked_once(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        asked = count_gate(site)
        for _ in range(20):
            assert (await site.infer("client")).code == "OK"
        assert asked == [INFER], "every request went through Python"
        assert (await site.infer("client", "other-one")).text.endswith("is not found")
        assert (await site.infer("viewer")).code == "PERMISSION_DENIED"
        assert (await site.infer("nothing")).text.endswith("is not found")
        assert (await site.infer(None)).code == "UNAUTHENTICATED"
        assert (await site.infer("gibberish")).code == "UNAUTHENTICATED"
        assert asked == [INFER] * 6


@pytest.mark.parametrize("door", NATIVE)
async def test_refusals_give_no_pass(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        for _ in range(3):
            assert (await site.infer("viewer")).code == "PERMISSION_DENIED"
            assert (await site.infer("client", "other-one")).code == "INVALID_ARGUMENT"
            assert (await site.call(INFER, b"\xff\xff", "client")).code == "INVALID_ARGUMENT"
        assert site.application._passes is not None and site.application._passes.entries == 0


@pytest.mark.parametrize("door", NATIVE)
async def test_a_revoked_key_passes_no_more(models: Path, door: str) -> None:
    """Replayed after its revocation, what was let through before is refused, within the seconds that are promised."""
    async with serve_secured(models, door) as site:
        gate: Any = site.application._gate
        authenticator = gate._authenticators[0]
        for _ in range(3):
            assert (await site.infer("client")).code == "OK"
        has_changed = [True]

        async def refresh() -> bool:
            return has_changed.pop() if has_changed else False

        del authenticator._fixed[KEYS["client"].id]
        authenticator.refresh = refresh
        begin = time.monotonic()
        async with asyncio.timeout(TIMEOUT_S):
            while (await site.infer("client")).code == "OK":
                await asyncio.sleep(0.05)
        assert time.monotonic() - begin < 5
        assert (await site.infer("client")).code == "UNAUTHENTICATED"


@pytest.mark.parametrize("door", NATIVE)
async def test_a_pass_ends_with_its_credentials(models: Path, door: str) -> None:
    soon = time.time_ns() + 1_500_000_000
    async with serve_secured(models, door) as site:
        gate: Any = site.application._gate
        known = gate._authenticators[0]._fixed
        known[KEYS["client"].id] = dataclasses.replace(known[KEYS["client"].id], expires_ns=soon)
        assert (await site.infer("client")).code == "OK"
        async with asyncio.timeout(TIMEOUT_S):
            while (answer := await site.infer("client")).code == "OK":
                assert time.time_ns() < soon + 50_000_000
                await asyncio.sleep(0.01)
        assert (answer.code, answer.text) == ("UNAUTHENTICATED", "the credentials have expired")
        assert time.time_ns() >= soon


async def test_what_changes_while_a_call_runs_gives_no_pass(models: Path) -> None:
    """The gate forgets between the decision and the answer: the pass would outlive what it stands for."""
    async with serve_secured(models) as site:
        gate: Any = site.application._gate
        admit = gate.admit

        def forget_first(*arguments: Any) -> None:
            remembered = dict(gate._remembered)
            gate.forget()
            gate._remembered.update(remembered)  # another call of the same caller was faster
            admit(*arguments)

        gate.admit = forget_first
        assert (await site.infer("client")).code == "OK"
        assert site.application._passes is not None and site.application._passes.entries == 0


@pytest.mark.parametrize("door", DOORS)
async def test_a_tenants_quota_holds_at_all_doors(models: Path, door: str) -> None:
    keys = [
        {"id": KEYS[name].id, "sha256": KEYS[name].sha256.hex(), "principal": name, "tenant": tenant}
        for name, tenant in (("client", "red"), ("deployer", "red"), ("admin", "blue"))
    ]
    security = {"api_keys": keys, "quotas": [{"tenant": "red", "requests_per_s": 5}]}
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
    async with serve_secured(models, door, security=security) as site:
        answers = [await site.infer(caller) for caller in ("client", "deployer") * 6]
        codes = [each.code for each in answers]
        assert codes[0] == "OK" and codes.count("RESOURCE_EXHAUSTED") >= 4
        refused = next(each for each in answers if each.code != "OK")
        assert "red" in refused.text
        over_rest = await site.ask("POST", "/v2/models/own-one/infer", "client", json=body)
        assert over_rest.status_code == 429 and int(over_rest.headers["retry-after"]) >= 1
        streamed = await site.call(INFER.replace("ModelInfer", "ModelStreamInfer"), b"\n\x07own-one", "client")
        assert b"red" in streamed.data
        assert [(await site.infer("admin")).code for _ in range(10)] == ["OK"] * 10, "another tenant's"


async def test_rows_and_requests_in_flight(models: Path) -> None:
    quotas = [{"tenant": "*", "rows_per_s": 8}]
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [8, 1], "data": [1.0] * 8}]}
    async with serve_secured(models, security={"quotas": quotas}) as site:
        statuses = [
            (await site.ask("POST", "/v2/models/own-one/infer", "client", json=body)).status_code for _ in range(2)
        ]
        assert statuses == [200, 429]
        other = await site.ask("POST", "/v2/models/own-one/infer", "deployer", json=body)
        assert other.status_code == 200, "each tenant has its own"
        quota = site.application._gate._quotas.find("client")  # type: ignore[union-attr]
        assert quota is not None and quota.counters().in_flight == 0


@pytest.mark.parametrize("door", DOORS)
async def test_quotas_are_on_metrics(models: Path, door: str) -> None:
    """Those of tenants that have called, with what each was given and refused."""
    quotas = [{"tenant": "*", "requests_per_s": 0.001}]
    async with serve_secured(models, door, security={"quotas": quotas}) as site:
        url = f"http://127.0.0.1:{site.application.metrics_port}/metrics"
        codes = [(await site.infer("client")).code for _ in range(3)]
        assert codes == ["OK", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]
        scraped = (await site.ask("GET", url, "root")).text.splitlines()
        assert 'aiorch_quota_admitted_total{tenant="client"} 1.0' in scraped
        assert 'aiorch_quota_refused_total{bound="requests",tenant="client"} 2.0' in scraped
        assert 'aiorch_quota_in_flight{tenant="client"} 0.0' in scraped
