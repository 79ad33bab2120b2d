# Requests coming in: headers judged, DATA cut into messages, complete messages listed. See h2.pxd for the whole.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t

from aiorch_server._core.h2_stream cimport Connection, Message, Stream

# --- what nghttp2's callbacks report
# One header pair; -1 when memory ran out.
cdef int take_header(Stream *stream, const uint8_t *name, size_t name_size,
                     const uint8_t *value, size_t value_size) noexcept nogil
# All headers of a request are there: checks them and decides which way it goes.
cdef void open_call(Stream *stream) noexcept nogil
# Cuts DATA into messages, whatever the cuts between frames.
cdef void take_bytes(Stream *stream, const uint8_t *data, size_t size) noexcept nogil
# Books and allocates room for the message's first `size` bytes, and for as many again. -1: the stream was refused.
cdef int extend_message(Stream *stream, size_t size) noexcept nogil
# END_STREAM was received.
cdef void end_request(Stream *stream) noexcept nogil

# --- for the driver
# The next stream whose message is complete, or NULL. Its `message` may be taken (set it to NULL) with a `request` put
# in its place; or it is answered, failed or made slow.
cdef Stream *take_ready(Connection *connection) noexcept nogil
# The next slow stream that something happened to, with the bits of `StreamEvent`, or NULL. After EVENT_OVER:
# set `owner` to NULL and call release_stream.
cdef Stream *take_event(Connection *connection, uint32_t *events) noexcept nogil
# Hands a ready stream to the Python plane: EVENT_CALL, EVENT_MESSAGE and EVENT_HALF_CLOSE follow.
cdef void make_slow(Stream *stream) noexcept nogil
# The next complete message (the caller frees it with free_message), or NULL. Opens the client's window again.
cdef Message *take_message(Stream *stream) noexcept nogil
