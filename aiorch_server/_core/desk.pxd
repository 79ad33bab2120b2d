# What both drivers do between sessions and queues: complete messages go to their queues, answers come back to their
# streams, and a stream that is over gives its request up.
#
# Ownership: a Stream's `request` belongs to the queue until it comes back through the sink or from cancel_request; the
# stream only remembers it. All functions are for the thread of the stream's group.

from aiorch_server._core.h2_stream cimport Connection, Group, Stream
from aiorch_server._core.passes cimport Claim
from aiorch_server._core.request cimport CompletionSink, Request
from aiorch_server._core.routes cimport RouteReader


# For new_group: cuts the tie between a stream that is over and its request in flight.
cdef void abandon_request(Stream *stream) noexcept nogil
# What a stream shows where its group has passes: the one `authorization` header, or else the connection's certificate.
# It points into the stream.
cdef void read_claim(Stream *stream, Claim *claim) noexcept nogil
# Puts the connection's complete messages into their queues; what the router declines becomes a slow call, and so does
# everything where `sink` is NULL.
cdef void dispatch_ready(Connection *connection, RouteReader *reader, CompletionSink *sink) noexcept nogil
# Gives what came back through the sink to its stream, and frees the request. The stream's connection, which has
# something to say now; NULL where nobody waits for the answer any more.
cdef Connection *settle_request(Group *group, Request *request) noexcept nogil
