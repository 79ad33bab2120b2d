"""One running server for the whole folder and each driver; after every test somebody else's call must be right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from http2_peer import GREETING, Peer, call
from running_site import Site, write_models

MAX_STREAMS = 40


@pytest.fixture(scope="session", params=[0, 1], ids=["loop", "io-thread"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    models = write_models(tmp_path_factory.mktemp("models"))
    running = Site(models, io_threads=request.param, limits={"max_concurrent_streams": MAX_STREAMS})
    yield running
    running.close()


@pytest.fixture
def connect(site: Site) -> Iterator[Callable[..., Peer]]:
    """Makes connections; at the end of the test a fresh one must be served rightly."""
    peers: list[Peer] = []

    def make(greeting: bytes = GREETING, **options: bool) -> Peer:
        peers.append(Peer(site.port, greeting, **options))
        return peers[-1]

    yield make
    for peer in peers:
        peer.socket.close()
    with Peer(site.port) as fresh:
        fresh.send(call(1))
        fresh.read_answer(1).check()


@pytest.fixture
def peer(connect: Callable[..., Peer]) -> Peer:
    return connect()
