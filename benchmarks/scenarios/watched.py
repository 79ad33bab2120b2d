"""A server as the command line starts it, which also tells what a tuner would see: ``watched.py FOLDER``.

It serves the models of FOLDER on a free port. Each line of standard input is answered by one line, both JSON: the
keyword arguments of ``Scheduler.set_policy`` for all models, or for the one named ``model`` (``{}``: none) -> ``port``,
for each model its observation, ``accounts``: what ``Explain`` tells, by model, ``threads``: the CPU time of each of the
process's threads in ns, by number, and ``tuning_ns``: that of the tuner. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import uvloop

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig
from aiorch_server.optimizer.optimizer import Optimizer
from aiorch_server.optimizer.tuned import TunedVersion

_CONFIG = {
    "grpc": {"host": "127.0.0.1", "port": 0},
    "http": {"enabled": False},
    "metrics": {"enabled": False},
}


def read_threads() -> dict[str, int]:
    """CPU time in ns of the process's threads."""
    used: dict[str, int] = {}
    for task in Path("/proc/self/task").iterdir():
        used[task.name] = int((task / "schedstat").read_text().split()[0])
    return used


Step = Callable[..., Coroutine[Any, Any, None]]


class Spent:
    """CPU time of what the tuner thinks and does, in the threads where it does so."""

    def __init__(self) -> None:
        self.ns = 0

    def count(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted."""

        def counted(*arguments: Any, **named: Any) -> Any:
            began_ns = time.thread_time_ns()
            try:
                return function(*arguments, **named)
            finally:
                self.ns += time.thread_time_ns() - began_ns

        return counted

    def count_steps(
        self, function: Callable[..., Coroutine[Any, Any, None]]
    ) -> Callable[..., Coroutine[Any, Any, None]]:
        """The same coroutine, its time on the event loop counted."""

        async def counted(*arguments: Any) -> None:
            await _Steps(function(*arguments), self)

        return counted


class _Steps:
    """A coroutine taken step by step."""

    def __init__(self, inner: Coroutine[Any, Any, None], spent: Spent) -> None:
        self._send, self._throw = spent.count(inner.send), spent.count(inner.throw)

    def __await__(self) -> Generator[Any, Any, None]:
        step: Callable[[], Any] = lambda: self._send(None)  # noqa: E731
        while True:
            try:
                waited = step()
            except StopIteration:
                return
            try:
                yield waited
                step = lambda: self._send(None)  # noqa: E731
            except BaseException as error:
                step = functools.partial(self._throw, error)


async def serve(folder: str) -> None:
    spent = Spent()
    # observing and moving happen on the event loop, thinking in threads that end with the thought
    TunedVersion._think = spent.count(TunedVersion._think)  # type: ignore[method-assign]
    TunedVersion.tick = spent.count_steps(TunedVersion.tick)  # type: ignore[method-assign]
    Optimizer.tick = spent.count_steps(Optimizer.tick)  # type: ignore[method-assign]
    config = ServerConfig.model_validate({**_CONFIG, "repository": {"paths": [folder]}})
    async with Application(config) as app:
        commands = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        while line := await commands.readline():
            told: dict[str, Any] = {"port": app.grpc_port, "threads": read_threads(), "models": {}}
            policy = json.loads(line)
            model = policy.pop("model", None)
            for servable in app.manager.servables():
                scheduler = servable.plain_scheduler
                assert scheduler is not None
                if policy and model in (None, servable.name):
                    scheduler.set_policy(**policy)
                told["models"][servable.name] = dataclasses.asdict(scheduler.observe())
            assert app.optimizer is not None
            told["accounts"] = {each.model: dataclasses.asdict(each) for each in app.optimizer.explain()}
            told["tuning_ns"] = spent.ns
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
