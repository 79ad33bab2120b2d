"""Requests coming in; see h2_request.pxd."""

from libc.stdlib cimport malloc
from libc.string cimport memcmp, memcpy, memmove

from aiorch_server._core.buffers cimport COPY_RECEIVED, count_copied, drop_buffer, grow_buffer, new_buffer
from aiorch_server._core.grpc_text cimport is_grpc_content_type, parse_timeout, read_frame_size
from aiorch_server._core.h2_answer cimport answer_http, refuse_size, refuse_stream
from aiorch_server._core.h2_life cimport has_room
from aiorch_server._core.h2_stream cimport *
from aiorch_server._core.nghttp2 cimport nghttp2_session_consume_stream
from aiorch_server._core.request cimport TraceParent
from aiorch_server._core.shares cimport hash_key
from aiorch_server._core.timers cimport set_timer

cdef enum:
    STATUS_INVALID_ARGUMENT = 3
    STATUS_RESOURCE_EXHAUSTED = 8
    STATUS_UNIMPLEMENTED = 12
    STATUS_INTERNAL = 13
    FIRST_BOOKED_BYTES = 4096           # what a length prefix alone can make us book: the page that its bytes touch
    FIRST_MESSAGE_BYTES = 4194304       # ... and allocate: memory that nobody writes to is only addresses


cdef inline bint _is(const uint8_t *text, size_t size, const char *wanted, size_t wanted_size) noexcept nogil:
    return size == wanted_size and memcmp(text, wanted, wanted_size) == 0


cdef int _hex(uint8_t digit) noexcept nogil:
    if c'0' <= digit <= c'9':
        return digit - c'0'
    return digit - c'a' + 10 if c'a' <= digit <= c'f' else -1


cdef void read_trace_parent(const uint8_t *text, size_t size, TraceParent *parent) noexcept nogil:
    """https://www.w3.org/TR/trace-context/: version-trace-span-flags, in lower-case digits; what is not so is no parent."""
    cdef size_t i
    cdef int trace_bits = 0, span_bits = 0
    parent.is_present = False
    if size < 55 or (size > 55 and (text[55] != c'-' or text[0] == c'0' and text[1] == c'0')):
        return
    for i in range(55):
        if i == 2 or i == 35 or i == 52:
            if text[i] != c'-':
                return
        elif _hex(text[i]) < 0:
            return
        elif 2 < i < 35:
            trace_bits |= _hex(text[i])
        elif 35 < i < 52:
            span_bits |= _hex(text[i])
    if trace_bits == 0 or span_bits == 0 or (text[0] == c'f' and text[1] == c'f'):
        return
    for i in range(16):
        parent.trace_id[i] = <uint8_t> (_hex(text[3 + 2 * i]) << 4 | _hex(text[4 + 2 * i]))
    for i in range(8):
        parent.span_id[i] = <uint8_t> (_hex(text[36 + 2 * i]) << 4 | _hex(text[37 + 2 * i]))
    parent.is_sampled = _hex(text[54]) & 1
    parent.is_present = True


cdef uint32_t _read_accepted(const uint8_t *value, size_t size) noexcept nogil:
    """The encodings of a comma-separated list that are known, as bits."""
    cdef uint32_t bits = 0
    cdef size_t start = 0, end, next_start
    while start < size:
        end = start
        while end < size and value[end] != c',':
            end += 1
        next_start = end + 1
        while start < end and value[start] == c' ':
            start += 1
        while end > start and value[end - 1] == c' ':
            end -= 1
        if _is(value + start, end - start, b"gzip", 4):
            bits |= 1 << ENCODING_GZIP
        elif _is(value + start, end - start, b"deflate", 7):
            bits |= 1 << ENCODING_DEFLATE
        start = next_start
    return bits


cdef int take_header(Stream *stream, const uint8_t *name, size_t name_size,
                     const uint8_t *value, size_t value_size) noexcept nogil:
    cdef Group *group = stream.group
    stream.header_list_bytes += name_size + value_size + 32     # RFC 9113, 6.5.2
    if stream.header_list_bytes > group.limits.max_header_list_bytes:
        return 0
    if name[0] == c':':
        if _is(name, name_size, b":path", 5):
            if group.fast_path_size and _is(value, value_size, <const char *> group.fast_path, group.fast_path_size):
                stream.is_fast_path = True
                return 0
        elif _is(name, name_size, b":method", 7):
            stream.is_post = _is(value, value_size, b"POST", 4)
            return 0
        else:
            return 0
    elif _is(name, name_size, b"te", 2):
        return 0
    elif _is(name, name_size, b"grpc-accept-encoding", 20):
        stream.accepted |= _read_accepted(value, value_size)
        return 0
    elif _is(name, name_size, b"content-type", 12):
        stream.is_grpc = is_grpc_content_type(value, value_size)
        return 0
    elif _is(name, name_size, b"grpc-timeout", 12):
        stream.timeout_ns = parse_timeout(value, value_size)
        stream.has_bad_timeout = stream.timeout_ns < 0
        return 0
    elif _is(name, name_size, b"grpc-encoding", 13):
        if _is(value, value_size, b"identity", 8):
            stream.encoding = ENCODING_IDENTITY
        elif _is(value, value_size, b"gzip", 4):
            stream.encoding = ENCODING_GZIP
        elif _is(value, value_size, b"deflate", 7):
            stream.encoding = ENCODING_DEFLATE
        else:
            stream.encoding = ENCODING_UNKNOWN
        return 0
    elif name_size == 11 and _is(name, name_size, b"traceparent", 11):
        read_trace_parent(value, value_size, &stream.parent)
    elif name_size == 16 and _is(name, name_size, b"aiorch-route-key", 16):
        stream.mark.has_key = value_size > 0
        stream.mark.key = hash_key(value, value_size)
    elif name_size == 13 and _is(name, name_size, b"aiorch-timing", 13):
        stream.wants_timing = True
    elif name_size == 13 and _is(name, name_size, b"authorization", 13):
        stream.n_credentials += 1
        stream.credential_at, stream.credential_size = stream.metadata_size + 8 + name_size, value_size
    return keep_metadata(stream, name, name_size, value, value_size)


cdef void open_call(Stream *stream) noexcept nogil:
    cdef Connection *connection = stream.connection
    cdef Limits *limits = &connection.group.limits
    stream.kind = STREAM_FAST if stream.is_fast_path else STREAM_SLOW
    if stream.is_fast_path and (stream.wants_timing or stream.accepted & connection.group.packed_encodings):
        _leave_fast_path(stream)        # its trailers are Python's; its answer is packed, which may take long
    if stream.header_list_bytes > limits.max_header_list_bytes:     # first: what came later was not even looked at
        refuse_size(stream, b"Received metadata larger than max", stream.header_list_bytes,
                    limits.max_header_list_bytes)
    elif not stream.is_post:
        answer_http(stream, b"405")
    elif not stream.is_grpc:
        answer_http(stream, b"415")
    elif stream.has_bad_timeout:
        refuse_stream(stream, STATUS_INVALID_ARGUMENT,
                b"Malformed grpc-timeout header: expected at most 8 digits and one of H, M, S, m, u, n")
    elif stream.encoding == ENCODING_UNKNOWN:
        refuse_stream(stream, STATUS_UNIMPLEMENTED,
                b"Compression algorithm of grpc-encoding is not supported; use identity, deflate or gzip")
    elif connection.outbound_bytes > limits.max_outbound_bytes:
        refuse_size(stream, b"Answers on this connection are not being read: unsent bytes above max",
                    connection.outbound_bytes, limits.max_outbound_bytes)
    else:
        if stream.timeout_ns >= 0 and set_timer(&connection.group.deadlines, &stream.deadline,
                                                connection.now_ns + stream.timeout_ns, stream) < 0:
            refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"Out of memory")
        elif stream.kind == STREAM_SLOW:
            push_event(stream, EVENT_CALL)


cdef int _begin_message(Stream *stream, const uint8_t *head, size_t head_size) noexcept nogil:
    """The 5-byte prefix is complete, `head` is what has come behind it. -1: the stream was refused."""
    cdef Connection *connection = stream.connection
    cdef Limits *limits = &connection.group.limits
    cdef size_t size = read_frame_size(stream.prefix)
    if stream.prefix[0] > 1:
        refuse_stream(stream, STATUS_INTERNAL, b"Bad gRPC frame: the compressed flag is neither 0 nor 1")
        return -1
    if stream.prefix[0] == 1 and stream.encoding == ENCODING_IDENTITY:
        refuse_stream(stream, STATUS_INTERNAL, b"Bad gRPC frame: compressed flag set, but grpc-encoding names no compression")
        return -1
    if stream.has_message:
        refuse_stream(stream, STATUS_UNIMPLEMENTED, b"A unary call carries exactly one request message, received more")
        return -1
    if size > limits.max_message_bytes:
        refuse_size(stream, b"Received message larger than max", size, limits.max_message_bytes)
        return -1
    stream.is_message_compressed = stream.prefix[0] == 1
    stream.message_size, stream.message_filled, stream.message_align = size, 0, 0
    if size >= PLACED_FROM_BYTES and stream.kind == STREAM_FAST and stream.group.place_rest != NULL:
        _place_rest(stream, head, min(head_size, size))
    if stream.group.find_tensor != NULL and size > head_size and stream.rest.buffer == NULL:
        stream.message_align = stream.group.find_tensor(head, head_size, size)
    return extend_message(stream, min(size, <size_t> FIRST_BOOKED_BYTES))


cdef void _place_rest(Stream *stream, const uint8_t *head, size_t head_size) noexcept nogil:
    """Asks the driver where the end of the message belongs."""
    cdef Group *group = stream.group
    if stream.is_message_compressed or not group.place_rest(
            stream, head, head_size, stream.message_size, &stream.rest):
        stream.rest.buffer = NULL
        return
    stream.message = new_buffer(stream.rest.at, 0)
    if stream.message == NULL:
        drop_buffer(stream.rest.buffer)
        stream.rest.buffer = NULL
        return
    stream.message_capacity = stream.message_size


cdef int extend_message(Stream *stream, size_t size) noexcept nogil:
    cdef Connection *connection = stream.connection
    cdef size_t booked = connection.partial_bytes - stream.message_booked
    cdef size_t claimed = max(stream.message_booked, <size_t> FIRST_BOOKED_BYTES)
    cdef size_t capacity = stream.message_capacity * 2
    cdef uint8_t *grown
    while claimed < size:           # never by `size` itself: how the bytes were cut shall not matter
        claimed *= 2
    claimed = min(claimed, stream.message_size)
    if size <= stream.message_capacity:     # it grows when it is full: then no landing holds it, and it need not be moved
        claimed = min(claimed, stream.message_capacity)
    booked += claimed
    if booked > connection.group.limits.max_buffered_bytes:
        refuse_size(stream, b"Unfinished messages on this connection larger than max", booked,
                     connection.group.limits.max_buffered_bytes)
        return -1
    if not has_room(connection, claimed - stream.message_booked):
        refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"The server holds as many bytes of messages as it may; try again later")
        return -1
    if claimed > stream.message_capacity:
        capacity = min(max(capacity, max(claimed, <size_t> FIRST_MESSAGE_BYTES)), stream.message_size)
        grown = grow_buffer(stream.message, stream.message_filled, capacity, stream.message_align)
        if grown == NULL:
            refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"Out of memory")
            return -1
        stream.message, stream.message_capacity = grown, capacity
    stream.message_booked = claimed
    connection.partial_bytes = booked
    return 0


cdef int _finish_message(Stream *stream) noexcept nogil:
    """The message is complete. -1: the stream was refused."""
    cdef Connection *connection = stream.connection
    stream.prefix_size = 0
    stream.received_ns = connection.now_ns
    if stream.kind == STREAM_FAST:
        stream.has_message = True
        return 0
    return _list_message(stream)


cdef int _list_message(Stream *stream) noexcept nogil:
    """Moves the complete message into the inbox of a slow call. -1: the stream was refused."""
    cdef Connection *connection = stream.connection
    cdef Message *message = <Message *> malloc(sizeof(Message))
    if message == NULL:
        refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"Out of memory")
        return -1
    message.next = NULL
    message.data, message.size = stream.message, stream.message_size
    message.is_compressed = stream.is_message_compressed
    connection.partial_bytes -= stream.message_booked
    connection.unread_bytes += message.size + LISTED_MESSAGE_BYTES
    stream.message, stream.message_capacity, stream.message_booked = NULL, 0, 0
    if stream.inbox_tail != NULL:
        stream.inbox_tail.next = message
    else:
        stream.inbox_head = message
    stream.inbox_tail = message
    push_event(stream, EVENT_MESSAGE)
    return 0


cdef void take_bytes(Stream *stream, const uint8_t *data, size_t size) noexcept nogil:
    cdef size_t n
    cdef uint8_t *place
    while size:
        if stream.prefix_size < FRAME_PREFIX_BYTES:
            n = FRAME_PREFIX_BYTES - stream.prefix_size
            if n > size:
                n = size
            memcpy(stream.prefix + stream.prefix_size, data, n)
            stream.prefix_size += <int> n
            if stream.prefix_size == FRAME_PREFIX_BYTES and _begin_message(stream, data + n, size - n) < 0:
                return
        else:
            n = stream.message_size - stream.message_filled
            if n > size:
                n = size
            if stream.rest.buffer != NULL and stream.message_filled < stream.rest.at:
                n = min(n, stream.rest.at - stream.message_filled)
            if (stream.message_filled + n > stream.message_booked
                    and extend_message(stream, stream.message_filled + n) < 0):
                return
            place = find_place(stream, stream.message_filled)
            if place != data:           # else it was received there
                memmove(place, data, n)     # they overlap where the frames were not those that had been guessed
                count_copied(COPY_RECEIVED, n)
            stream.message_filled += n
        data += n
        size -= n
        if (stream.prefix_size == FRAME_PREFIX_BYTES and stream.message_filled == stream.message_size
                and _finish_message(stream) < 0):
            return


cdef void end_request(Stream *stream) noexcept nogil:
    cdef Connection *connection = stream.connection
    stream.is_remote_closed = True
    if stream.is_finished:
        return
    if stream.prefix_size != 0:
        refuse_stream(stream, STATUS_INTERNAL, b"The request ended in the middle of a message")
    elif stream.kind == STREAM_SLOW:
        push_event(stream, EVENT_HALF_CLOSE)
    elif not stream.has_message:
        refuse_stream(stream, STATUS_UNIMPLEMENTED, b"A unary call carries exactly one request message, received none")
    elif stream.is_message_compressed:
        make_slow(stream)
    else:
        connection.partial_bytes -= stream.message_booked
        stream.message_booked = 0
        stream.is_ready_listed = True
        stream.next_ready = NULL
        if connection.ready_tail != NULL:
            connection.ready_tail.next_ready = stream
        else:
            connection.ready_head = stream
        connection.ready_tail = stream


cdef Stream *take_ready(Connection *connection) noexcept nogil:
    cdef Stream *stream
    while connection.ready_head != NULL:
        stream = connection.ready_head
        connection.ready_head = stream.next_ready
        if connection.ready_head == NULL:
            connection.ready_tail = NULL
        stream.is_ready_listed = False
        if stream.connection != NULL and not stream.is_finished:
            return stream
        release_stream(stream)
    return NULL


cdef Stream *take_event(Connection *connection, uint32_t *events) noexcept nogil:
    cdef Stream *stream
    while connection.event_head != NULL:
        stream = connection.event_head
        connection.event_head = stream.next_event
        if connection.event_head == NULL:
            connection.event_tail = NULL
        stream.is_event_listed = False
        events[0] = stream.events
        stream.events = 0
        if stream.owner != NULL or (stream.connection != NULL and not stream.is_finished):
            return stream
        release_stream(stream)      # over before anybody saw it, or let go of by its owner
    return NULL


cdef int _leave_fast_path(Stream *stream) noexcept nogil:
    """From now on a slow call. -1: the stream was refused."""
    cdef Group *group = stream.group
    stream.kind = STREAM_SLOW
    if keep_metadata(stream, <const uint8_t *> b":path", 5, group.fast_path, group.fast_path_size) < 0:
        refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"Out of memory")
        return -1
    return 0


cdef void make_slow(Stream *stream) noexcept nogil:
    stream.has_message = False
    if join_message(stream) < 0:
        refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"Out of memory")
        return
    if _leave_fast_path(stream) < 0:
        return
    push_event(stream, EVENT_CALL | EVENT_HALF_CLOSE)
    _list_message(stream)


cdef Message *take_message(Stream *stream) noexcept nogil:
    cdef Message *message = stream.inbox_head
    cdef Connection *connection = stream.connection
    cdef size_t give
    if message == NULL:
        return NULL
    stream.inbox_head = message.next
    if stream.inbox_head == NULL:
        stream.inbox_tail = NULL
        give = stream.unconsumed_bytes      # with those of a message under assembly: it may be larger than the window
    else:
        give = message.size + FRAME_PREFIX_BYTES
        if give > stream.unconsumed_bytes:
            give = stream.unconsumed_bytes
    connection.unread_bytes -= message.size + LISTED_MESSAGE_BYTES
    stream.unconsumed_bytes -= give
    if give:
        nghttp2_session_consume_stream(connection.session, stream.id, give)
    release_window(connection)
    return message
