# Room 1, the door's core: one gRPC server session per connection over libnghttp2.
# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, RFC 9113.
#
# Contract: no sockets, no Python objects, no logging, no clock (`now_ns` is passed in). No function here needs the
# interpreter lock, so an asyncio protocol and an epoll thread can drive the same code. A Group and everything in it
# belong to one driver thread; nothing is locked.
#
# The driver's round: feed() what the socket gave; take_event() until NULL; take_ready() until NULL; answer what is
# answered; collect() until 0 and write that; when is_over() close the socket. Then close_connection(),
# take_event() until NULL once more, free_connection().
#
# Two kinds of streams. FAST: POST to the group's fast path. Its one message is assembled and handed over complete
# through the ready list. SLOW: everything else, seen through events; also what the driver turns away from the fast
# path with make_slow().
#
# The session lies in five modules, each on those before it: h2_stream (records and life of streams), h2_answer (going
# out), h2_life (of connections: keep-alive, age, memory), h2_request (coming in), and this one: groups, connections,
# nghttp2's callbacks. Drivers cimport from all five.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t

from aiorch_server._core.h2_ledger cimport Ledger
from aiorch_server._core.h2_rules cimport LifeRules
from aiorch_server._core.h2_stream cimport Connection, Group, Limits, Outlet, Stream
from aiorch_server._core.passes cimport PassTable


cdef enum:
    MIN_COLLECT_BYTES = 32768   # collect() wants at least this much room: a whole DATA frame and its header


# --- groups and connections
# NULL when memory ran out. `abandon` may be NULL where no request is ever put into a stream.
cdef Group *new_group(const Limits *limits, const uint8_t *fast_path, size_t fast_path_size,
                      void (*abandon)(Stream *) noexcept nogil) noexcept nogil
# Before the first connection: its rules, what it shares with others (may be NULL), and encodings (see Group).
cdef void set_rules(Group *group, const LifeRules *rules, Ledger *ledger, uint32_t packed_encodings) noexcept nogil
# Likewise: fast calls without a pass are declined from now on. Keeps a reference.
cdef void set_passes(Group *group, PassTable *passes) noexcept nogil
cdef void release_group(Group *group) noexcept nogil
# NULL when memory or the ledger's places ran out (has_place tells). Without begin_life() no rule is ever looked at.
cdef Connection *open_connection(Group *group, void *owner) noexcept nogil
# Ends all streams (events tell slow calls, `abandon` the fast ones). Nothing can be sent afterwards.
cdef void close_connection(Connection *connection) noexcept nogil
# Only after close_connection and when no event is left.
cdef void free_connection(Connection *connection) noexcept nogil

# --- driving
# Takes all bytes. -1: the connection is broken, close the socket.
cdef int feed(Connection *connection, const uint8_t *data, size_t size, int64_t now_ns) noexcept nogil
# Fills `buffer` (capacity >= MIN_COLLECT_BYTES) with what is to be sent; bytes written, 0: nothing more now, -1: broken.
cdef Py_ssize_t collect(Connection *connection, uint8_t *buffer, size_t capacity) noexcept nogil
# The same for a gathering write: what answers have on loan is left where it lies. After the write: clear_outlet. When
# it could not take all, its loans may be moved elsewhere (set to NULL) before.
cdef Py_ssize_t collect_pieces(Connection *connection, Outlet *outlet) noexcept nogil
cdef void clear_outlet(Outlet *outlet) noexcept nogil
# Whether everything is said and the socket should be closed.
cdef bint is_over(Connection *connection) noexcept nogil
# Two-step GOAWAY: tells the client to open no more streams; those in flight are still answered.
cdef void drain_connection(Connection *connection) noexcept nogil
# The second step at once, for a client that does not answer the PING between the two; nothing if it was taken already.
cdef void finish_drain(Connection *connection) noexcept nogil
