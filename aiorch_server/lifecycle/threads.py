"""Blocking work beside the event loop, on daemon threads of its own.

A thread pool would not do: a framework that hangs while it loads would keep a place in the pool for ever, and the
interpreter waits for pool threads at exit.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


def start_thread(name: str, function: Callable[[], Result]) -> Future[Result]:
    """Runs ``function`` in a new daemon thread; the future cannot be cancelled."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


async def wait_until(future: Future[Any], timeout_s: float | None) -> bool:
    """Whether ``future`` of another thread is done within ``timeout_s``; safe to cancel, leaves the future alone."""
    if future.done():
        return True
    waiter = asyncio.wrap_future(future)
    try:
        await asyncio.wait({waiter}, timeout=timeout_s)
    finally:
        if not waiter.cancel() and not waiter.cancelled():
            waiter.exception()  # seen here, so that asyncio does not report it as lost
    return future.done()


async def run_blocking(
    name: str,
    function: Callable[[], Result],
    *,
    timeout_s: float | None = None,
    discard: Callable[[Result], object] | None = None,
) -> Result:
    """Awaits ``function`` in a thread of its own; TimeoutError after ``timeout_s``.

    When the caller is cancelled or the time is over, the thread is left to itself, and ``discard`` gets its result
    (in that thread) should it come after all.
    """
    future = start_thread(name, function)
    is_done = False
    try:
        is_done = await wait_until(future, timeout_s)
    finally:
        if not is_done:
            future.add_done_callback(lambda late: _discard(late, discard))
    if not is_done:
        raise TimeoutError(f"'{name}' did not finish within {timeout_s:g} s")
    return future.result()


def _discard(late: Future[Result], discard: Callable[[Result], object] | None) -> None:
    if discard is not None and late.exception() is None:
        discard(late.result())
