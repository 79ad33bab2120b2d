"""For authors of backends: ``BackendConformance``, a pytest class that holds a backend to its contract."""

from aiorch_server.testing.conformance import BackendConformance
from aiorch_server.testing.samples import contradict, make_inputs

__all__ = ["BackendConformance", "contradict", "make_inputs"]
