"""Which version a request is for, and what of it others get to see."""

from aiorch_server.routing.samples import Observer, Replay, Sample, Samples
from aiorch_server.routing.traffic import ROUTE_KEY, WHOLE, Share, Traffic

__all__ = ["ROUTE_KEY", "WHOLE", "Observer", "Replay", "Sample", "Samples", "Share", "Traffic"]
