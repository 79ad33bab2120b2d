"""A scheduler with an instance that the test steers by hand, and a mailbox to reach it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from hand_driven import HandDriven, make_spec

from aiorch_server._core import Mailbox, Scheduler


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(make_spec())


@pytest.fixture
def instance(scheduler: Scheduler) -> Iterator[HandDriven]:
    driven = HandDriven(scheduler)
    yield driven
    driven.stop()


@pytest.fixture
async def mailbox() -> AsyncIterator[Mailbox]:
    box = Mailbox(asyncio.get_running_loop())
    yield box
    box.close()
