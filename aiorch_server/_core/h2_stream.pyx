"""Streams of a gRPC session from their first header to the free list; see h2_stream.pxd for who owns what."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from aiorch_server._core.buffers cimport COPY_RECEIVED, count_copied, drop_buffer, new_buffer
from aiorch_server._core.loans cimport drop_lent_list
from aiorch_server._core.nghttp2 cimport nghttp2_session_consume_connection
from aiorch_server._core.timers cimport clear_timer

cdef enum:
    MAX_FREE_STREAMS = 4096


cdef int keep_metadata(Stream *stream, const uint8_t *name, size_t name_size,
                        const uint8_t *value, size_t value_size) noexcept nogil:
    cdef size_t need = stream.metadata_size + 8 + name_size + value_size
    cdef size_t capacity = stream.metadata_capacity
    cdef uint8_t *grown
    cdef uint32_t sizes[2]
    if need > capacity:
        while capacity < need:
            capacity *= 2
        if stream.metadata == stream.inline_metadata:
            grown = <uint8_t *> malloc(capacity)
            if grown != NULL:
                memcpy(grown, stream.metadata, stream.metadata_size)
        else:
            grown = <uint8_t *> realloc(stream.metadata, capacity)
        if grown == NULL:
            return -1
        stream.metadata, stream.metadata_capacity = grown, capacity
    sizes[0], sizes[1] = <uint32_t> name_size, <uint32_t> value_size
    memcpy(stream.metadata + stream.metadata_size, sizes, 8)
    memcpy(stream.metadata + stream.metadata_size + 8, name, name_size)
    memcpy(stream.metadata + stream.metadata_size + 8 + name_size, value, value_size)
    stream.metadata_size = need
    return 0


cdef list unpack_metadata(const uint8_t *packed, size_t size):
    cdef list pairs = []
    cdef size_t at = 0
    cdef uint32_t sizes[2]
    while at < size:
        memcpy(sizes, packed + at, 8)
        at += 8
        pairs.append((PyBytes_FromStringAndSize(<const char *> packed + at, sizes[0]),
                      PyBytes_FromStringAndSize(<const char *> packed + at + sizes[0], sizes[1])))
        at += <size_t> sizes[0] + sizes[1]
    return pairs


cdef bytes pack_metadata(object pairs):
    cdef list parts = []
    cdef uint32_t sizes[2]
    cdef bytes name, value
    for name, value in pairs:
        sizes[0], sizes[1] = <uint32_t> len(name), <uint32_t> len(value)
        parts.append(PyBytes_FromStringAndSize(<char *> sizes, 8))
        parts.append(name)
        parts.append(value)
    return b"".join(parts)


cdef Stream *new_stream(Connection *connection, int32_t stream_id) noexcept nogil:
    cdef Group *group = connection.group
    cdef Stream *stream = group.free_streams
    if stream != NULL:
        group.free_streams = stream.next_ready
        group.n_free -= 1
    else:
        stream = <Stream *> malloc(sizeof(Stream))
        if stream == NULL:
            return NULL
    memset(stream, 0, <size_t> (stream.inline_metadata - <uint8_t *> stream))
    stream.metadata, stream.metadata_capacity = stream.inline_metadata, INLINE_METADATA_BYTES
    stream.id, stream.connection, stream.group, stream.timeout_ns = stream_id, connection, group, -1
    stream.opened_ns = connection.now_ns
    stream.older = connection.streams
    if stream.older != NULL:
        stream.older.newer = stream
    connection.streams = stream
    connection.n_streams += 1
    return stream


cdef void release_stream(Stream *stream) noexcept nogil:
    cdef Group *group = stream.group
    if (stream.connection != NULL or stream.is_ready_listed or stream.is_event_listed
            or stream.owner != NULL or stream.request != NULL):
        return
    if stream.metadata != stream.inline_metadata:
        free(stream.metadata)
    if stream.status_text != stream.inline_text:
        free(stream.status_text)
    free(stream.trailing)
    if group.n_free < MAX_FREE_STREAMS:
        stream.next_ready = group.free_streams
        group.free_streams = stream
        group.n_free += 1
    else:
        free(stream)


cdef void drop_message(Stream *stream) noexcept nogil:
    stream.connection.partial_bytes -= stream.message_booked
    drop_buffer(stream.message)
    drop_buffer(stream.rest.buffer)
    stream.rest.buffer = NULL
    stream.message, stream.message_capacity, stream.message_booked = NULL, 0, 0


cdef int join_message(Stream *stream) noexcept nogil:
    cdef uint8_t *joined
    if stream.rest.buffer == NULL:
        return 0
    joined = new_buffer(stream.message_size, 0)
    if joined == NULL:
        return -1
    memcpy(joined, stream.message, stream.rest.at)
    memcpy(joined + stream.rest.at, stream.rest.data, stream.message_size - stream.rest.at)
    count_copied(COPY_RECEIVED, stream.message_size)
    drop_buffer(stream.message)
    drop_buffer(stream.rest.buffer)
    stream.message, stream.rest.buffer = joined, NULL
    return 0


cdef void drop_inbox(Stream *stream) noexcept nogil:
    cdef Message *message
    while stream.inbox_head != NULL:
        message = stream.inbox_head
        stream.inbox_head = message.next
        stream.connection.unread_bytes -= message.size + LISTED_MESSAGE_BYTES
        free_message(message)
    stream.inbox_tail = NULL


cdef void drop_outbound(Stream *stream) noexcept nogil:
    cdef Chunk *chunk
    stream.connection.outbound_bytes -= stream.unsent_bytes
    stream.unsent_bytes = 0
    drop_buffer(stream.out)
    drop_lent_list(stream.lent)
    stream.out, stream.out_size, stream.out_sent = NULL, 0, 0
    stream.lent = NULL
    while stream.out_head != NULL:
        chunk = stream.out_head
        stream.out_head = chunk.next
        drop_buffer(chunk.data)
        free(chunk)
    stream.out_tail = NULL


cdef void push_event(Stream *stream, uint32_t event) noexcept nogil:
    cdef Connection *connection = stream.connection
    stream.events |= event
    if stream.is_event_listed:
        return
    stream.is_event_listed = True
    stream.next_event = NULL
    if connection.event_tail != NULL:
        connection.event_tail.next_event = stream
    else:
        connection.event_head = stream
    connection.event_tail = stream


cdef void close_stream(Stream *stream) noexcept nogil:
    cdef Connection *connection = stream.connection
    clear_timer(&connection.group.deadlines, &stream.deadline)
    drop_message(stream)
    drop_inbox(stream)
    drop_outbound(stream)
    if stream.owner != NULL:
        push_event(stream, EVENT_OVER)
    if stream.newer != NULL:
        stream.newer.older = stream.older
    else:
        connection.streams = stream.older
    if stream.older != NULL:
        stream.older.newer = stream.newer
    connection.n_streams -= 1
    if connection.n_streams == 0:
        connection.life.idle_since_ns = connection.group.now_ns
    stream.connection = NULL
    release_window(connection)
    if stream.request != NULL:
        stream.group.abandon(stream)
    release_stream(stream)


cdef void release_window(Connection *connection) noexcept nogil:
    cdef size_t size = connection.withheld_bytes
    if (size and connection.unread_bytes <= connection.group.limits.max_buffered_bytes
            and not connection.life.is_held):
        connection.withheld_bytes = 0
        nghttp2_session_consume_connection(connection.session, size)


cdef void detach_owner(Stream *stream) noexcept nogil:
    stream.owner = NULL
    if stream.connection != NULL:
        drop_inbox(stream)
        release_window(stream.connection)
    release_stream(stream)


cdef void free_message(Message *message) noexcept nogil:
    drop_buffer(message.data)
    free(message)


cdef class SessionLimits:
    """The limits of a server's sessions, see Limits in h2_stream.pxd; ValueError for a window beyond HTTP/2's."""

    def __cinit__(self, *, size_t max_message_bytes=64 << 20, uint32_t max_concurrent_streams=1024,
                  uint32_t max_header_list_bytes=16 << 10, uint32_t stream_window_bytes=8 << 20,
                  uint32_t connection_window_bytes=16 << 20, size_t max_buffered_bytes=256 << 20,
                  size_t max_outbound_bytes=256 << 20, size_t high_water_bytes=1 << 20):
        cdef Limits *limits = &self.limits
        if stream_window_bytes >= 1 << 31 or connection_window_bytes >= 1 << 31:
            raise ValueError("HTTP/2 windows end at 2147483647 bytes")
        limits.max_message_bytes, limits.max_concurrent_streams = max_message_bytes, max_concurrent_streams
        limits.max_header_list_bytes, limits.stream_window_bytes = max_header_list_bytes, stream_window_bytes
        limits.connection_window_bytes, limits.max_buffered_bytes = connection_window_bytes, max_buffered_bytes
        limits.max_outbound_bytes, limits.high_water_bytes = max_outbound_bytes, high_water_bytes
