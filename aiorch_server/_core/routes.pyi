from collections.abc import Mapping

from aiorch_server._core.scheduler import Scheduler
from aiorch_server._core.shares import Shares

_Route = tuple[int, Mapping[int, Scheduler]] | tuple[int, Mapping[int, Scheduler], Shares | None]

class Router:
    def __init__(self) -> None: ...
    def publish(self, routes: Mapping[str, _Route]) -> None: ...
