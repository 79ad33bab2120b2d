"""How requests that name no version are shared among versions."""

from aiorch_server.routing.traffic import ROUTE_KEY, WHOLE, Share, Traffic

__all__ = ["ROUTE_KEY", "WHOLE", "Share", "Traffic"]
