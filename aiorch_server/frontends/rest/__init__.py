"""The REST door: the V2 HTTP protocol with its binary tensor, statistics and repository extensions.

Unmodified ``tritonclient.http`` works against it. Where it differs from Triton on purpose:

- a body over the limit is answered with 413, not 400 (``status.py`` holds the whole table);
- the JSON part of a request has a limit of its own, because parsing it stops the event loop;
- JSON tensor data is checked strictly: numbers out of a datatype's range are refused instead of wrapped;
- problems in a document are told by their path (``inputs[0].shape[1]: ...``);
- raw binary requests (header length 0), ``generate``, tracing, logging settings and shared memory answer 501.
"""

from aiorch_server.frontends.rest.server import RestServer

__all__ = ["RestServer"]
