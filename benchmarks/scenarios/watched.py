"""A server as the command line starts it, which also tells what a tuner would see: ``watched.py FOLDER``.

It serves the models of FOLDER on a free port. Each line of standard input is answered by one line, both JSON: the
keyword arguments of ``Scheduler.set_policy`` for all models (``{}``: none) -> ``port``, for each model its observation,
and ``threads``: the CPU time of each of the process's threads in ns, by number. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import uvloop

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

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


async def serve(folder: str) -> None:
    config = ServerConfig.model_validate({**_CONFIG, "repository": {"paths": [folder]}})
    async with Application(config) as app:
        commands = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        while line := await commands.readline():
            told: dict[str, Any] = {"port": app.grpc_port, "threads": read_threads(), "models": {}}
            for servable in app.manager.servables():
                scheduler = servable.plain_scheduler
                assert scheduler is not None
                if policy := json.loads(line):
                    scheduler.set_policy(**policy)
                told["models"][servable.name] = dataclasses.asdict(scheduler.observe())
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
