"""A Prometheus of its own that scrapes one metrics door of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

PROMETHEUS = shutil.which("prometheus")
DEADLINE_S = 60
CONFIG = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}
scrape_configs:
  - job_name: aiorch
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@asynccontextmanager
async def scraping(folder: Path, port: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a Prometheus that scrapes that port four times a second and keeps its data in the folder."""
    assert PROMETHEUS is not None, "Prometheus is not installed: 'make test' does it, or 'apt-get install prometheus'"
    (folder / "prometheus.yml").write_text(CONFIG.format(port=port))
    address = f"127.0.0.1:{find_free_port()}"
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            PROMETHEUS,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", verify=False, timeout=10) as client:
            yield client
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), DEADLINE_S)


async def ask(client: httpx.AsyncClient, query: str) -> list[dict[str, Any]]:
    """The result of an instant query as soon as there is one."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = await client.get("/api/v1/query", params={"query": query})
                if response.status_code == 200 and response.json()["data"]["result"]:
                    return response.json()["data"]["result"]
            await asyncio.sleep(0.1)
