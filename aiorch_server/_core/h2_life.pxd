# The life of a gRPC connection: keep-alive, age, idleness, and what a client may not do for long. Sans-I/O.
# https://grpc.github.io/grpc/core/group__grpc__arg__keys.html has the rules' names; gRFC A8, A9 their sense.
#
# The driver calls begin_life() for a new connection. From then on the group's `lives` says when a connection wants to
# be looked after: next_tending() is the driver's timer, tend_due() does what is due. A connection that it gives may
# have something to send, or is_over() holds: the driver treats it as if bytes had come.
#
#   keep-alive   nothing received for keepalive_time: PING; nothing for keepalive_timeout after it was sent: broken.
#                Any byte is an answer. The timeout runs out twice, a moment apart, so that a driver that was itself
#                late first reads what has come.
#   age, idle    two-step GOAWAY (drain_connection); after the grace calls end with UNAVAILABLE; a moment later: broken
#   PINGs        more than max_ping_strikes too early: GOAWAY with ENHANCE_YOUR_CALM and too_many_pings, then closed
#   frames       more than MAX_IDLE_FRAMES that ask for nothing, one after the other: the same
#   resets       more than the streams that it may have open (at least RESETS_BURST) at once, or than RESETS_PER_S after
#                that: GOAWAY with ENHANCE_YOUR_CALM, no more streams, what is open goes on (CVE-2023-44487). Calls that
#                were open for PATIENT_NS do not count, and EXPIRED_RESETS whose time is up count as one: clients reset
#                them by the thousand, and the server would end them itself
#   stall        complete fast answers that the client's windows keep here for stall_ns: broken. Answers of slow calls
#                may wait, as their reader may be slow, but not while the server is short of memory
#   hold         while the server is short of memory, connections in the middle of large messages get no more window;
#                for MAX_HOLD at a time, since what is short may be just what they hold
#
# Memory is short from three quarters of the ledger's bound; above it new messages are refused (h2_request).

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.h2_rules cimport LifeRules
from aiorch_server._core.h2_stream cimport Connection, Group, Stream
from aiorch_server._core.nghttp2 cimport nghttp2_frame


# --- for the driver
# -1: no memory for the timer.
cdef int begin_life(Connection *connection, int64_t now_ns) noexcept nogil
# When tend_due() is worth a call, 0: never.
cdef int64_t next_tending(Group *group) noexcept nogil
# Looks after one connection that is due, and gives it; NULL: none is.
cdef Connection *tend_due(Group *group, int64_t now_ns) noexcept nogil

# --- for the session
# Two-step GOAWAY and its second step: see h2.pxd
cdef void begin_leaving(Connection *connection) noexcept nogil
cdef void finish_leaving(Connection *connection) noexcept nogil
# The PING between the two.
cdef void submit_drain_ping(Connection *connection) noexcept nogil
cdef void note_ping(Connection *connection, const nghttp2_frame *frame) noexcept nogil
cdef void note_ping_sent(Connection *connection, const nghttp2_frame *frame) noexcept nogil
# The client has reset a stream, which is still open; NULL: it was closed already.
cdef void note_reset(Connection *connection, Stream *stream) noexcept nogil
# A frame that asks for nothing.
cdef void note_idle_frame(Connection *connection) noexcept nogil
# GOAWAY with ENHANCE_YOUR_CALM and this text, and the end.
cdef void calm_down(Connection *connection, const char *text) noexcept nogil

# --- the books: after each feed() and collect(), at the end, and by drivers that cannot collect
cdef void balance_books(Connection *connection) noexcept nogil
# Whether the server may hold so many bytes more; counts a refusal where not.
cdef bint has_room(Connection *connection, size_t more) noexcept nogil


cdef class ConnectionRules:
    cdef LifeRules rules
