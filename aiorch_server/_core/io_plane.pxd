# An I/O thread's side of the calls that run on the asyncio plane: what it tells and what it is told. See crossing.pxd.

from aiorch_server._core.crossing cimport Command, Event, Link
from aiorch_server._core.io_state cimport IoConnection, IoState


# Puts an event among those of this round.
cdef void post(IoState *io, Event *event) noexcept nogil
# Tells the asyncio plane what happened to the connection's calls. -1: no memory, some were answered instead.
cdef int tell_events(IoConnection *connection) noexcept nogil
# One command to a call; the stream may be over, the connection gone.
cdef void carry_out(IoState *io, Link *link, Command *command) noexcept nogil
