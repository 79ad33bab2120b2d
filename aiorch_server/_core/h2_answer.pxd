# Answers going out: from a status or a framed message to HEADERS, DATA and trailers. See h2.pxd for the whole.
#
# nghttp2 asks _read_answer how much may go into the next DATA frame and calls send_data to take it, straight into the
# buffer that collect() fills: an answer is copied once between the instance and the socket's buffer. What an answer has
# on loan is not copied at all where the driver writes pieces.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

from aiorch_server._core.h2_stream cimport Connection, Stream
from aiorch_server._core.loans cimport LentList
from aiorch_server._core.nghttp2 cimport nghttp2_data_source, nghttp2_frame, nghttp2_session


# All of them do nothing but free what they were given when the stream is closed or finished already
# One message (a buffer, 5-byte prefix in front, owned from now on, and so is what is lent to it; `size` is that of both)
# and status OK. Where the server holds as many bytes as it may: RESOURCE_EXHAUSTED, here and in send_message.
cdef void answer_stream(Stream *stream, uint8_t *frame, size_t size, LentList *lent) noexcept nogil
# A status without a message; `text` is UTF-8 and copied.
cdef void fail_stream(Stream *stream, int status, const uint8_t *text, size_t size) noexcept nogil
# Initial metadata (packed, may be NULL), once and before the first message; send_message does it by itself otherwise.
cdef void send_head(Stream *stream, const uint8_t *metadata, size_t size) noexcept nogil
# One more message, framed as for answer_stream.
cdef void send_message(Stream *stream, uint8_t *frame, size_t size) noexcept nogil
# Ends a slow call; `trailing` is packed metadata (may be NULL) and copied.
cdef void finish_stream(Stream *stream, int status, const uint8_t *text, size_t text_size,
                        const uint8_t *trailing, size_t trailing_size) noexcept nogil
# The deadline has passed: abandons the request or tells the slow call, and answers DEADLINE_EXCEEDED.
cdef void expire_stream(Stream *stream) noexcept nogil
# As expire_stream, but with the status and text given: the server takes the call back.
cdef void revoke_stream(Stream *stream, int status, const char *text) noexcept nogil

# --- on the session's own account: whoever holds the call is told that it is over
cdef void refuse_stream(Stream *stream, int status, const char *text) noexcept nogil
# RESOURCE_EXHAUSTED with "<before> (<size> vs. <limit>)", as gRPC words it.
cdef void refuse_size(Stream *stream, const char *before, size_t size, size_t limit) noexcept nogil
# Headers that end the stream, for what is no gRPC call at all; `http_status` has three digits.
cdef void answer_http(Stream *stream, const char *http_status) noexcept nogil

# nghttp2's send_data callback.
# Bytes of nghttp2's own, into the buffer and the outlet; the caller has looked whether they fit.
cdef void put_own(Connection *connection, const uint8_t *data, size_t size) noexcept nogil
cdef int send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *frame_header, size_t length,
                   nghttp2_data_source *source, void *context) noexcept nogil
