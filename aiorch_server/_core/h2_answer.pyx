"""Answers going out; see h2_answer.pxd."""

from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, strlen

from aiorch_server._core.buffers cimport COPY_SENT, count_copied, drop_buffer
from aiorch_server._core.grpc_text cimport cut_status_text, percent_encode, put_decimal
from aiorch_server._core.h2_life cimport has_room
from aiorch_server._core.h2_stream cimport (
    EVENT_OVER,
    EVENT_WRITABLE,
    INLINE_TEXT_BYTES,
    MAX_OUTLET_PIECES,
    STREAM_SLOW,
    Chunk,
    Connection,
    Outlet,
    drop_message,
    drop_outbound,
    push_event,
    takes_answers,
)
from aiorch_server._core.loans cimport Lent, LentList, drop_lent_list, hold_loan
from aiorch_server._core.nghttp2 cimport *
from aiorch_server._core.timers cimport clear_timer

cdef enum:
    STATUS_DEADLINE_EXCEEDED = 4
    STATUS_RESOURCE_EXHAUSTED = 8
    INLINE_NVS = 16
    FRAME_HEAD_BYTES = 9
    SMALL_ANSWER_BYTES = 1024           # a refusal would hardly take less


cdef struct NvList:
    nghttp2_nv inline_items[INLINE_NVS]
    nghttp2_nv *items
    size_t count
    size_t capacity


cdef inline void _set_nv(nghttp2_nv *nv, const char *name, size_t name_size, const uint8_t *value, size_t value_size,
                         int flags) noexcept nogil:
    nv.name, nv.namelen = <uint8_t *> name, name_size
    nv.value, nv.valuelen = <uint8_t *> value, value_size
    nv.flags = <uint8_t> flags


cdef int _add_packed(NvList *nvs, const uint8_t *packed, size_t size) noexcept nogil:
    """Appends packed metadata, which libnghttp2 copies; -1 when memory ran out."""
    cdef size_t at = 0, capacity
    cdef uint32_t sizes[2]
    cdef nghttp2_nv *grown
    while at < size:
        if nvs.count == nvs.capacity:
            capacity = nvs.capacity * 2
            if nvs.items == nvs.inline_items:
                grown = <nghttp2_nv *> malloc(capacity * sizeof(nghttp2_nv))
                if grown != NULL:
                    memcpy(grown, nvs.items, nvs.count * sizeof(nghttp2_nv))
            else:
                grown = <nghttp2_nv *> realloc(nvs.items, capacity * sizeof(nghttp2_nv))
            if grown == NULL:
                return -1
            nvs.items, nvs.capacity = grown, capacity
        memcpy(sizes, packed + at, 8)
        at += 8
        _set_nv(&nvs.items[nvs.count], <const char *> packed + at, sizes[0], packed + at + sizes[0], sizes[1],
                NGHTTP2_NV_FLAG_NONE)
        nvs.count += 1
        at += <size_t> sizes[0] + sizes[1]
    return 0


cdef inline void _start_nvs(NvList *nvs) noexcept nogil:
    nvs.items, nvs.count, nvs.capacity = nvs.inline_items, 0, INLINE_NVS


cdef inline void _end_nvs(NvList *nvs) noexcept nogil:
    if nvs.items != nvs.inline_items:
        free(nvs.items)


cdef void _add_head(NvList *nvs, bint is_slow) noexcept nogil:
    cdef int flags = NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE
    _set_nv(&nvs.items[0], b":status", 7, <const uint8_t *> b"200", 3, flags)
    _set_nv(&nvs.items[1], b"content-type", 12, <const uint8_t *> b"application/grpc", 16, flags)
    nvs.count = 2
    if is_slow:
        _set_nv(&nvs.items[2], b"grpc-accept-encoding", 20, <const uint8_t *> b"identity,deflate,gzip", 21, flags)
        nvs.count = 3


cdef int _add_status(NvList *nvs, Stream *stream, char *digits) noexcept nogil:
    """Appends status, message and trailing metadata; `digits` must live until the headers are submitted."""
    _set_nv(&nvs.items[nvs.count], b"grpc-status", 11, <const uint8_t *> digits,
            put_decimal(digits, <size_t> stream.status), NGHTTP2_NV_FLAG_NO_COPY_NAME)
    nvs.count += 1
    if stream.status_text_size:
        _set_nv(&nvs.items[nvs.count], b"grpc-message", 12, stream.status_text, stream.status_text_size,
                NGHTTP2_NV_FLAG_NO_COPY_NAME)
        nvs.count += 1
    return _add_packed(nvs, stream.trailing, stream.trailing_size)


cdef void _reset(Stream *stream) noexcept nogil:
    """The last resort when memory ran out: the client sees INTERNAL instead of waiting."""
    stream.is_finished = True
    drop_outbound(stream)
    if nghttp2_submit_rst_stream(stream.connection.session, NGHTTP2_FLAG_NONE, stream.id, NGHTTP2_INTERNAL_ERROR) != 0:
        stream.connection.is_broken = True


cdef void _submit_head(Stream *stream, const uint8_t *metadata, size_t size) noexcept nogil:
    cdef nghttp2_data_provider provider
    cdef NvList nvs
    provider.source.ptr, provider.read_callback = stream, _read_answer
    stream.is_head_sent = True
    _start_nvs(&nvs)
    _add_head(&nvs, stream.kind == STREAM_SLOW)
    if (_add_packed(&nvs, metadata, size) < 0
            or nghttp2_submit_response(stream.connection.session, stream.id, nvs.items, nvs.count, &provider) != 0):
        _reset(stream)
    _end_nvs(&nvs)


cdef void _submit_status_only(Stream *stream) noexcept nogil:
    """Trailers-Only: head and status in one header block that ends the stream."""
    cdef NvList nvs
    cdef char digits[24]
    stream.is_head_sent = True
    _start_nvs(&nvs)
    # an unknown encoding must be answered with the known ones; harmless elsewhere
    _add_head(&nvs, True)
    if (_add_status(&nvs, stream, digits) < 0
            or nghttp2_submit_response(stream.connection.session, stream.id, nvs.items, nvs.count, NULL) != 0):
        _reset(stream)
    _end_nvs(&nvs)


cdef int _submit_trailers(Stream *stream) noexcept nogil:
    cdef NvList nvs
    cdef char digits[24]
    cdef int result = -1
    _start_nvs(&nvs)
    if _add_status(&nvs, stream, digits) == 0:
        result = nghttp2_submit_trailer(stream.connection.session, stream.id, nvs.items, nvs.count)
    _end_nvs(&nvs)
    return result


cdef inline void _resume(Stream *stream) noexcept nogil:
    if stream.is_deferred:
        stream.is_deferred = False
        if nghttp2_session_resume_data(stream.connection.session, stream.id) != 0:
            _reset(stream)


cdef inline void _add_outbound(Connection *connection, size_t size) noexcept nogil:
    if connection.outbound_bytes == 0:
        connection.life.moved_ns = connection.group.now_ns
    connection.outbound_bytes += size


cdef bint _is_too_much(Stream *stream, size_t size) noexcept nogil:
    """Refuses the stream where the server may not hold that much more: a small question can have a big answer."""
    if size <= SMALL_ANSWER_BYTES or has_room(stream.connection, size):
        return False
    refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"The server holds as many bytes of messages as it may; try again later")
    return True


cdef void answer_stream(Stream *stream, uint8_t *frame, size_t size, LentList *lent) noexcept nogil:
    if not takes_answers(stream):
        drop_buffer(frame)
        drop_lent_list(lent)
        return
    if _is_too_much(stream, size):
        drop_buffer(frame)
        drop_lent_list(lent)
        return
    stream.is_finished = True
    clear_timer(&stream.group.deadlines, &stream.deadline)
    stream.out, stream.out_size, stream.lent = frame, size, lent
    stream.out_own_sent = stream.lent_sent = 0
    stream.lent_at = 0
    stream.unsent_bytes = size
    _add_outbound(stream.connection, size)
    _submit_head(stream, NULL, 0)


cdef void send_head(Stream *stream, const uint8_t *metadata, size_t size) noexcept nogil:
    if takes_answers(stream) and not stream.is_head_sent:
        _submit_head(stream, metadata, size)


cdef void send_message(Stream *stream, uint8_t *frame, size_t size) noexcept nogil:
    cdef Chunk *chunk
    if not takes_answers(stream) or _is_too_much(stream, size):
        drop_buffer(frame)
        return
    if stream.out == NULL:
        stream.out, stream.out_size, stream.out_own_sent = frame, size, 0
    else:
        chunk = <Chunk *> malloc(sizeof(Chunk))
        if chunk == NULL:
            drop_buffer(frame)
            refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"Out of memory")
            return
        chunk.next, chunk.data, chunk.size = NULL, frame, size
        if stream.out_tail != NULL:
            stream.out_tail.next = chunk
        else:
            stream.out_head = chunk
        stream.out_tail = chunk
    stream.unsent_bytes += size
    _add_outbound(stream.connection, size)
    if not stream.is_head_sent:
        _submit_head(stream, NULL, 0)
    else:
        _resume(stream)


cdef void _set_status(Stream *stream, int status, const uint8_t *text, size_t size) noexcept nogil:
    cdef size_t encoded_size
    stream.is_finished = True
    clear_timer(&stream.group.deadlines, &stream.deadline)
    stream.status = status
    size = cut_status_text(text, size, &encoded_size)
    if size == 0:
        return
    stream.status_text = stream.inline_text
    if encoded_size > INLINE_TEXT_BYTES:
        stream.status_text = <uint8_t *> malloc(encoded_size)
    if stream.status_text != NULL:                      # without memory the code alone has to do
        stream.status_text_size = percent_encode(text, size, stream.status_text)


cdef void _submit_end(Stream *stream) noexcept nogil:
    if not stream.is_head_sent:
        _submit_status_only(stream)
    else:
        _resume(stream)


cdef void fail_stream(Stream *stream, int status, const uint8_t *text, size_t size) noexcept nogil:
    if takes_answers(stream):
        _set_status(stream, status, text, size)
        _submit_end(stream)


cdef void finish_stream(Stream *stream, int status, const uint8_t *text, size_t text_size,
                        const uint8_t *trailing, size_t trailing_size) noexcept nogil:
    if not takes_answers(stream):
        return
    if trailing_size:
        stream.trailing = <uint8_t *> malloc(trailing_size)
        if stream.trailing != NULL:
            memcpy(stream.trailing, trailing, trailing_size)
            stream.trailing_size = trailing_size
    _set_status(stream, status, text, text_size)
    _submit_end(stream)


cdef void expire_stream(Stream *stream) noexcept nogil:
    revoke_stream(stream, STATUS_DEADLINE_EXCEEDED, b"Deadline Exceeded")


cdef void revoke_stream(Stream *stream, int status, const char *text) noexcept nogil:
    if takes_answers(stream):
        refuse_stream(stream, status, text)


cdef void refuse_stream(Stream *stream, int status, const char *text) noexcept nogil:
    drop_message(stream)
    if stream.request != NULL:
        stream.group.abandon(stream)
    if stream.kind == STREAM_SLOW:
        push_event(stream, EVENT_OVER)
    fail_stream(stream, status, <const uint8_t *> text, strlen(text))


cdef void refuse_size(Stream *stream, const char *before, size_t size, size_t limit) noexcept nogil:
    cdef char text[128]
    cdef size_t n = strlen(before)
    memcpy(text, before, n)
    memcpy(text + n, <const char *> b" (", 2)
    n += 2
    n += put_decimal(text + n, size)
    memcpy(text + n, <const char *> b" vs. ", 5)
    n += 5
    n += put_decimal(text + n, limit)
    text[n] = c')'
    text[n + 1] = 0
    refuse_stream(stream, STATUS_RESOURCE_EXHAUSTED, text)


cdef void answer_http(Stream *stream, const char *http_status) noexcept nogil:
    cdef nghttp2_nv nv
    _set_nv(&nv, b":status", 7, <const uint8_t *> http_status, 3, NGHTTP2_NV_FLAG_NO_COPY_NAME)
    stream.is_finished = stream.is_head_sent = True
    if nghttp2_submit_response(stream.connection.session, stream.id, &nv, 1, NULL) != 0:
        _reset(stream)


cdef ssize_t _read_answer(nghttp2_session *session, int32_t stream_id, uint8_t *buffer, size_t length,
                          uint32_t *flags, nghttp2_data_source *source, void *context) noexcept nogil:
    """Says how much of the answer may go into one DATA frame; send_data copies it."""
    cdef Stream *stream = <Stream *> source.ptr
    cdef size_t left = stream.out_size - stream.out_sent
    cdef bint is_last = stream.is_finished and left <= length and stream.out_head == NULL
    if left == 0 and not stream.is_finished:
        stream.is_deferred = True
        return NGHTTP2_ERR_DEFERRED
    if left > length:
        left = length
    if left:
        flags[0] |= NGHTTP2_DATA_FLAG_NO_COPY
    if is_last:
        flags[0] |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM
        if _submit_trailers(stream) != 0:
            return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE   # resets this one stream
    return <ssize_t> left


cdef void put_own(Connection *connection, const uint8_t *data, size_t size) noexcept nogil:
    cdef Outlet *outlet = connection.outlet
    cdef uint8_t *place = connection.buffer + connection.buffer_size
    memcpy(place, data, size)
    connection.buffer_size += size
    if outlet == NULL:
        return
    outlet.size += size
    if outlet.n and outlet.loans[outlet.n - 1] == NULL:     # behind the last, which is in the buffer too
        outlet.pieces[outlet.n - 1].iov_len += size
        return
    outlet.pieces[outlet.n].iov_base, outlet.pieces[outlet.n].iov_len = place, size
    outlet.loans[outlet.n] = NULL
    outlet.n += 1


cdef void _put_lent(Connection *connection, Lent *lent, size_t at, size_t size) noexcept nogil:
    cdef Outlet *outlet = connection.outlet
    if outlet == NULL:
        put_own(connection, lent.data + at, size)
        count_copied(COPY_SENT, size)
        return
    outlet.pieces[outlet.n].iov_base, outlet.pieces[outlet.n].iov_len = <void *> (lent.data + at), size
    outlet.loans[outlet.n] = lent.loan
    hold_loan(lent.loan)
    outlet.n += 1
    outlet.size += size


cdef void _put_answer(Connection *connection, Stream *stream, size_t length) noexcept nogil:
    """The next `length` bytes of the message being sent."""
    cdef LentList *lent = stream.lent
    cdef bint is_lent
    cdef size_t n
    stream.out_sent += length
    while length:
        is_lent = (lent != NULL and stream.lent_at < lent.n
                   and lent.items[stream.lent_at].at == stream.out_own_sent)
        if is_lent:
            n = min(length, lent.items[stream.lent_at].size - stream.lent_sent)
            _put_lent(connection, &lent.items[stream.lent_at], stream.lent_sent, n)
            stream.lent_sent += n
            if stream.lent_sent == lent.items[stream.lent_at].size:
                stream.lent_at += 1
                stream.lent_sent = 0
        else:
            n = length
            if lent != NULL and stream.lent_at < lent.n:
                n = min(n, lent.items[stream.lent_at].at - stream.out_own_sent)
            put_own(connection, stream.out + stream.out_own_sent, n)
            count_copied(COPY_SENT, n)
            stream.out_own_sent += n
        length -= n


cdef int send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *frame_header, size_t length,
                   nghttp2_data_source *source, void *context) noexcept nogil:
    """Puts one DATA frame straight into what collect() fills."""
    cdef Connection *connection = <Connection *> context
    cdef Stream *stream = <Stream *> source.ptr
    cdef Chunk *chunk
    if connection.buffer_size + FRAME_HEAD_BYTES + length > connection.buffer_capacity:
        return NGHTTP2_ERR_WOULDBLOCK
    if (connection.outlet != NULL and stream.lent != NULL
            and connection.outlet.n + 2 * (stream.lent.n - stream.lent_at + 1) > MAX_OUTLET_PIECES):
        return NGHTTP2_ERR_WOULDBLOCK
    if connection.outlet != NULL and connection.outlet.n == MAX_OUTLET_PIECES:
        return NGHTTP2_ERR_WOULDBLOCK
    put_own(connection, frame_header, FRAME_HEAD_BYTES)
    _put_answer(connection, stream, length)
    stream.unsent_bytes -= length
    connection.outbound_bytes -= length
    connection.life.moved_ns = connection.group.now_ns
    if stream.out_sent == stream.out_size:
        drop_buffer(stream.out)
        drop_lent_list(stream.lent)
        stream.out, stream.out_size, stream.out_sent, stream.out_own_sent = NULL, 0, 0, 0
        stream.lent = NULL
        chunk = stream.out_head
        if chunk != NULL:
            stream.out, stream.out_size = chunk.data, chunk.size
            stream.out_head = chunk.next
            if stream.out_head == NULL:
                stream.out_tail = NULL
            free(chunk)
    if stream.wants_writable and stream.unsent_bytes <= connection.group.limits.high_water_bytes // 2:
        stream.wants_writable = False
        push_event(stream, EVENT_WRITABLE)
    return 0
