from collections.abc import Mapping

from aiorch_server._core.scheduler import Scheduler

class Router:
    def __init__(self) -> None: ...
    def publish(self, routes: Mapping[str, tuple[int, Mapping[int, Scheduler]]]) -> None: ...
