"""One server with a model that serves under load: the scene for what goes wrong around it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiorch_client import RetryPolicy
from aiorch_client.admin import AdminClient
from chaos_book import Content
from chaos_load import Load, Tally
from chaos_site import Server, Timeline

MODEL = "steady"


@dataclass
class Scene:
    """``admin`` tries nothing again; ``contents`` are the versions that were pushed."""

    server: Server
    admin: AdminClient
    load: Load
    folder: Path
    contents: dict[int, Content]

    def push(self, content: Content, **options: Any) -> int:
        """A further version; gives its number."""
        folder = content.write(self.folder / f"content-{content.number}")
        found = self.admin.push(MODEL, folder, is_origin_looked_up=False, **options)
        assert {each.path: each.sha256 for each in found.files} == content.digests
        self.contents[found.version] = content
        return found.version

    def check(self) -> Tally:
        """Ends the load: nothing has failed, and each answer was its version's."""
        tally = self.load.stop()
        assert not tally.wrong and not tally.failed and not tally.unconnected and not tally.refused, tally
        for (_, version), sums in tally.sums.items():
            assert sums == {float(self.contents[version].number)}
        assert not self.server.find_complaints()
        return tally


@contextlib.contextmanager
def scene(folder: Path, url: str, artefacts: Path, *, seed: int, callers: int = 3) -> Iterator[Scene]:
    """A server whose model of one version serves; what fails prints what happened, and the server's log."""
    timeline = Timeline()
    server = Server("server", folder / "server", url, artefacts, timeline)
    admin = AdminClient(server.target, retry=RetryPolicy(max_attempts=1))
    load = None
    try:
        server.start()
        content = Content.make(random.Random(seed), most_bytes=1000)
        found = Scene(server, admin, Load([], timeline, steady=()), folder, {})
        found.push(content)
        deployment = admin.deploy(MODEL, 1)
        assert deployment.rollout is not None
        assert admin.wait(deployment.rollout, timeout_s=60, look_s=0.05).state.value == "succeeded"
        load = found.load = Load([server], timeline, steady=[MODEL], callers=callers, seed=seed)
        yield found
        found.check()
        server.end()
    except BaseException:
        print(f"== failed with seed {seed}\n{timeline.tell()}\n== the end of the log\n{server.tell_log()}")
        raise
    finally:
        if load is not None:
            load.stop()
        admin.close()
        server.close()
