"""Where the requests of one model go: its ready versions, and the shares of those that requests without version get."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from aiorch_server._core import Scheduler, Shares
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.routing import Traffic

logger = logging.getLogger(__name__)


class Route:
    """One model in one publication of the routes; nothing in it changes but what ``shares`` count.

    ``default`` is what a look at the model without version gets: the first version that has a share, or the highest
    where there is no Traffic; 0 if no version with a share is ready. ``before`` is the model's last route.
    """

    __slots__ = ("_has_sequences", "_is_ensemble", "_traffic", "default", "name", "servables", "shares", "wanted")

    def __init__(
        self, name: str, servables: Mapping[int, Servable], traffic: Traffic | None, before: Route | None = None
    ) -> None:
        self.name = name
        self.servables = servables
        self.shares: Shares | None = None
        #: The versions that have a share, ready or not.
        self.wanted = () if traffic is None else tuple(each.version for each in traffic.shares if each.share)
        self._traffic = traffic
        self._has_sequences = any(each.sequencer is not None for each in servables.values())
        self._is_ensemble = any(each.ensemble is not None for each in servables.values())
        if traffic is None:
            self.default = max(servables)
            return
        wanted = {each.version: each.share for each in traffic.shares if each.share}
        ready = {version: share for version, share in wanted.items() if version in servables}
        self.default = next(iter(ready), 0)
        last = before.shares if before is not None else None
        if before is not None and before._traffic == traffic and (last.versions if last else ()) == tuple(ready):
            self.shares = last
            return
        if ready:
            self.shares = Shares(ready.items(), is_sticky=traffic.is_sticky, sampled=traffic.sampled, after=last)
        if missing := wanted.keys() - ready.keys():
            logger.warning(
                "'%s': version %s is not ready and gets no requests, its share goes to %s",
                name,
                ", ".join(map(str, sorted(missing))),
                f"version {', '.join(map(str, ready))}" if ready else "nobody: those that name no version are refused",
            )

    def look(self, number: int) -> Servable | None:
        """The version ``number``, 0: the default one; None if it is not ready."""
        return self.servables.get(number or self.default)

    def choose(
        self, number: int, key: bytes, correlation_id: int | str, chosen: tuple[int, bool] | None
    ) -> tuple[Servable, bool] | None:
        """As LifecycleManager.choose; None where there is no such version."""
        if number or not self.default:
            servable = self.servables.get(number)
            return None if servable is None else (servable, False)
        if correlation_id and self._has_sequences:
            for servable in self.servables.values():
                if servable.sequencer is not None and servable.sequencer.has_sequence(correlation_id):
                    return servable, False
        if self.shares is None:
            return self.servables[self.default], False
        if chosen is None or chosen[0] not in self.servables:
            if correlation_id and self._is_ensemble:  # its steps may keep a state
                chosen = self.shares.choose(str(correlation_id).encode("utf-8", "surrogatepass"), is_kept=True)
            else:
                chosen = self.shares.choose(key)
        return self.servables[chosen[0]], chosen[1]

    def list_choices(self, number: int) -> list[Servable]:
        """Everything that ``choose`` may give."""
        if number or self.shares is None:
            servable = self.look(number)
            return [] if servable is None else [servable]
        if self._has_sequences:  # where they are under way
            return list(self.servables.values())
        return [self.servables[version] for version in self.shares.versions]

    def find_plain(self) -> dict[int, Scheduler] | None:
        """The schedulers that the compiled desk may use by itself; None: the whole model is left to the data plane.

        Decoupled models answer over streams only, which the compiled desk does not carry; nor does it look into a
        cache.
        """
        plain: dict[int, Scheduler] = {}
        for version, each in self.servables.items():
            if each.plain_scheduler is None or each.signature.is_decoupled or each.cache is not None:
                return None
            plain[version] = each.plain_scheduler
        return plain
