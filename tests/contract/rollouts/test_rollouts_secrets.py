"""Why a version did not load is told to all who may see the model; where the store is, and who uses it, is not."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from rollout_site import Fleet, requests, until

from aiorch_server.errors import RegistryUnavailable
from aiorch_server.registry.checkout import Checkout
from aiorch_server.registry.records import RolloutState
from aiorch_server.registry.servers import read_server_statuses

SECRET = "s3://ann:hunter2@10.9.8.7/models"
TOLD = "the registry is away"


@pytest.fixture
def lose_store(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on no version's files can be had."""

    def refuse(checkout: Checkout, *arguments: object) -> None:
        raise RegistryUnavailable(f"artefact store {SECRET} does not answer: connection refused")

    return lambda: monkeypatch.setattr(Checkout, "acquire", refuse)


@pytest.mark.parametrize("is_on_demand", [False, True])
async def test_a_load_that_fails_tells_nothing_of_the_store(
    fleet: Fleet, lose_store: Callable[[], None], caplog: pytest.LogCaptureFixture, is_on_demand: bool
) -> None:
    server = await fleet.start()
    version = await fleet.push(add=1)
    lose_store()
    rollout = await fleet.wait((await fleet.deploy(version, is_on_demand=is_on_demand)).id)
    assert rollout.state is RolloutState.FAILED
    statuses = await fleet.database.read(lambda session: read_server_statuses(session, "m"))
    told = [rollout.reason, *(event.text for event in await fleet.events())]
    told += [each.reason for each in server.manager.index_model("m")]
    told += [each.reason for status in statuses for each in status.versions]
    assert TOLD in rollout.reason and not [text for text in told if "hunter2" in text or "10.9.8.7" in text]
    assert SECRET in caplog.text, "the operator's log says more"


async def test_nor_does_a_request_that_loads(fleet: Fleet, lose_store: Callable[[], None]) -> None:
    server = await fleet.start()
    await fleet.wait((await fleet.deploy(await fleet.push(add=1), is_on_demand=True)).id)
    await fleet.stop(server)
    server = await fleet.start()
    await until(lambda: server.manager.is_ready("m"))
    lose_store()
    async with requests(server, callers=0) as traffic:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await traffic.ask()
    assert TOLD in str(raised.value.details()) and "hunter2" not in str(raised.value.details())
