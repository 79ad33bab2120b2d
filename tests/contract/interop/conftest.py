"""The whole server, plain and with TLS, on the event loop and on an I/O thread, for clients that others wrote."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from running_site import TIMEOUT_S, Site, write_models

SITES = ["loop", "io-thread", "loop tls", "io-thread tls"]


@dataclass
class Place:
    """A running server and what a client needs to find and to trust it."""

    site: Site
    root: Path | None  # the certificate to trust, None without TLS

    @property
    def root_pem(self) -> bytes:
        assert self.root is not None
        return self.root.read_bytes()

    async def wait_pending(self, count: int) -> None:
        """Until so many requests wait at the gate."""
        await wait_until(lambda: self.site.count_pending() == count, f"{count} requests in the queue")


async def wait_until(is_true: Callable[[], Any], what: str) -> None:
    """Polls with a deadline."""
    end = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < end, f"never came: {what}"
        await asyncio.sleep(0.002)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's certificate that is its own authority; the key lies beside it."""
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout server.key -out server.pem -days 2 -subj /CN=localhost"
    extension = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run([*command.split(), "-addext", extension], cwd=folder, check=True, capture_output=True)
    return folder / "server.pem"


def open_place(kind: str, models: Path, certificate: Path, **grpc: Any) -> Place:
    driver, _, tls = kind.partition(" ")
    if tls:
        grpc["tls"] = {"certificate": str(certificate), "key": str(certificate.with_suffix(".key"))}
    site = Site(models, io_threads={"loop": 0, "io-thread": 1}[driver], grpc=grpc)
    return Place(site, certificate if tls else None)


@pytest.fixture(scope="session", params=SITES)
def place(request: pytest.FixtureRequest, models: Path, certificate: Path) -> Iterator[Place]:
    opened = open_place(request.param, models, certificate)
    yield opened
    opened.site.close()


@pytest.fixture
def open_for_restart(models: Path, certificate: Path) -> Iterator[Callable[..., Place]]:
    """Opens servers of the test's own; ``port`` takes that of one which was closed."""
    opened: list[Place] = []

    def make(kind: str, port: int = 0) -> Place:
        opened.append(open_place(kind, models, certificate, port=port))
        return opened[-1]

    yield make
    for each in opened:
        each.site.close()
