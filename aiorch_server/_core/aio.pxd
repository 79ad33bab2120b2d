# The asyncio driver of the gRPC sessions in h2: sockets, timers, and the way between streams, queues and Python.
#
# Everything here runs on the loop's thread. A loop tick costs one call per connection that read or wrote something,
# never one per request of the fast path: reads only feed sessions and mark connections as dirty; the tick's end
# dispatches all complete messages of all dirty connections, wakes the instances once, and writes once per connection.
#
# Ownership: a Stream's `owner` is a strong reference to its Call, given back with EVENT_OVER or by Call.finish; a
# Stream's `request` belongs to the queue until it comes back through the sink or from cancel_request.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.aio_call cimport CallCarrier
from aiorch_server._core.h2_stream cimport Connection, Group, Stream
from aiorch_server._core.request cimport CompletionSink
from aiorch_server._core.routes cimport RouteReader, Router


cdef class NativeServer:
    cdef object loop
    cdef object on_call             # callable(Call): starts a slow call
    cdef Router router              # may be None: then every call is a slow one
    cdef RouteReader reader
    cdef Group *group
    cdef CompletionSink *sink       # NULL once closed
    cdef uint8_t *receive_buffer    # shared: a read is fed before the next one begins
    cdef object receive_view
    cdef uint8_t *send_buffer
    cdef set protocols              # open connections
    cdef list dirty                 # connections that the tick's end must look at
    cdef bint is_tick_scheduled
    cdef object tick                # bound methods, made once
    cdef object timer               # the one deadline timer, or None
    cdef int64_t timer_due_ns
    cdef bint is_draining
    cdef bint is_closing            # the sink is closed when the last request in flight has come back
    cdef list idle_waiters          # futures of wait_disconnected
    cdef double greeting_timeout_s
    cdef double write_timeout_s

    cdef int mark_dirty(self, ConnectionProtocol protocol) except -1
    cdef int run_tick(self) except -1
    cdef int arm_timer(self) except -1
    cdef int close_sink(self) except -1


cdef class ConnectionProtocol(CallCarrier):
    cdef NativeServer server
    cdef Connection *connection     # NULL before connection_made and after connection_lost
    cdef bint is_dirty
    cdef bint is_write_paused
    cdef bint is_read_paused
    cdef bint is_resting            # reading is paused until the tick's end, for the sake of the other connections
    cdef int64_t busy_ns            # spent on what was read since the last tick
    cdef size_t greeting_bytes      # received while the client preface is awaited
    cdef object greeting_timer
    cdef object write_timer

    cdef int handle_events(self) except -1
    cdef int handle_event(self, Stream *stream, unsigned int events) except -1
    cdef int flush(self) except -1
    cdef int end_rest(self) except -1
