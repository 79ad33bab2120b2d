"""Tensors outside the message: what a request keeps in shared memory, and outputs that are asked for as classes."""

from aiorch_server.exchange.regions import SharedRegions, SystemRegion, refuse_cuda_region, refuse_cuda_status
from aiorch_server.exchange.request import Exchange

__all__ = ["Exchange", "SharedRegions", "SystemRegion", "refuse_cuda_region", "refuse_cuda_status"]
