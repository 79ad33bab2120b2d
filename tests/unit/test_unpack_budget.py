"""The budget of unpacked bytes: order, cancellation and patience; nothing reserved is ever lost."""

from __future__ import annotations

import asyncio

import pytest

from aiorch_server.frontends.unpacking import UnpackBudget


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_waiter_that_is_cancelled_keeps_nobody_waiting() -> None:
    budget = UnpackBudget(10)
    await budget.reserve(8)
    large = asyncio.create_task(budget.reserve(9))
    small = asyncio.create_task(budget.reserve(2))
    await settle()
    assert not small.done(), "in order of arrival"
    large.cancel()
    await small
    with pytest.raises(asyncio.CancelledError):
        await large
    budget.release(8)
    budget.release(2)
    assert budget.reserved_bytes == 0


async def test_cancelled_at_the_moment_of_the_grant() -> None:
    budget = UnpackBudget(10)
    await budget.reserve(10)
    waiting = asyncio.create_task(budget.reserve(10))
    await settle()
    budget.release(10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.reserved_bytes == 0


async def test_cancelled_before_the_grant() -> None:
    budget = UnpackBudget(10)
    await budget.reserve(10)
    waiting = asyncio.create_task(budget.reserve(10))
    await settle()
    waiting.cancel()
    budget.release(10)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.reserved_bytes == 0


async def test_patience_ends() -> None:
    budget = UnpackBudget(10, patience_s=0.01)
    await budget.reserve(10)
    with pytest.raises(TimeoutError):
        await budget.reserve(1)
    budget.release(10)
    await budget.reserve(1)
    assert budget.reserved_bytes == 1


async def test_more_than_the_budget_is_granted_alone() -> None:
    budget = UnpackBudget(10)
    await budget.reserve(1)
    huge = asyncio.create_task(budget.reserve(100))
    await settle()
    assert not huge.done()
    budget.release(1)
    await huge
    assert budget.reserved_bytes == 100
