"""What could not be answered in time is refused, and each door says so in its own way."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from running_site import encode_values
from secured import DOORS, IDENTITY, INFER, serve_secured, write_models

from aiorch_server._core import Scheduler

V2 = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}], "id": "9"}
TEXT = re.compile(
    r"\[request id: (9|<id_unknown>)\] cannot be answered in time: it would take 3\d{3}\.\d ms, and the "
    r"(model's objective is 1000\.0|caller waits \d+\.\d) ms; try again in (\d+)\.(\d{3}) s"
)


@pytest.mark.parametrize("door", DOORS)
async def test_who_is_too_late_is_told_when_to_come_back(tmp_path: Path, door: str) -> None:
    root = write_models(tmp_path)
    config = IDENTITY.replace("max_queue_delay_microseconds: 100", "max_queue_delay_microseconds: 60000000")
    (root / "own-one" / "config.pbtxt").write_text(config)
    async with serve_secured(root, door, security={"quotas": [{"tenant": "*", "requests_per_s": 4}]}) as site:
        (servable,) = [each for each in site.application.manager.servables() if each.name == "own-one"]
        scheduler = servable.scheduler
        assert isinstance(scheduler, Scheduler)
        curve = [(1, 3_000_000_000)]  # who waits for company, for a minute, is before all others
        scheduler.set_policy(max_rows=4, target_us=1_000_000, is_shedding=True, instances=1, curve=curve)
        waiting = asyncio.create_task(site.infer("client"))
        async with asyncio.timeout(20):
            while not scheduler.pending:
                await asyncio.sleep(0.005)
        message = encode_values([1.0, 2.0], "own-one")
        timed = [("aiorch-timing", "1")]
        for _ in range(4):  # what is refused so takes nothing of the quota
            for answer in (
                await site.infer("client"),
                await site.infer("client", metadata=timed),
                await site.call(INFER.replace("inference.", "aiorch.v2."), message, "client", metadata=timed),
            ):
                assert answer.code == "UNAVAILABLE", answer.text
                found = TEXT.fullmatch(answer.text)
                assert found is not None, answer.text
                assert int(answer.trailing["grpc-retry-pushback-ms"]) == int(found[3]) * 1000 + int(found[4])
        refused = await site.ask("POST", "/v2/models/own-one/infer", "client", json=V2)
        assert refused.status_code == 503 and TEXT.fullmatch(refused.json()["error"]), refused.text
        assert refused.headers["retry-after"] in ("2", "3")
        assert servable.statistics().refused_late == 13
        scheduler.set_policy(delay_us=0, is_shedding=False)
        assert (await waiting).code == "OK"
