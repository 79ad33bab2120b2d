"""Receiving straight into messages; see h2_landing.pxd for the contract."""

from libc.string cimport memcpy

from aiorch_server._core.buffers cimport COPY_RECEIVED, count_copied, drop_buffer, hold_buffer
from aiorch_server._core.h2 cimport feed
from aiorch_server._core.h2_request cimport extend_message
from aiorch_server._core.h2_stream cimport FRAME_PREFIX_BYTES, MIN_LANDING_BYTES, Stream, find_place
from aiorch_server._core.nghttp2 cimport NGHTTP2_FLAG_END_STREAM, nghttp2_session_get_stream_user_data

cdef enum:
    FOLLOWERS_TRIED = 8
    LEAST_GUESS_BYTES = 32768       # the first step after guessing was given up


# --- whose bytes come next
cdef inline Stream *_find_receiver(Connection *connection, int32_t stream_id) noexcept nogil:
    """The stream if it waits for more of a message, or NULL."""
    cdef Stream *stream
    if stream_id == 0:
        return NULL
    stream = <Stream *> nghttp2_session_get_stream_user_data(connection.session, stream_id)
    if (stream == NULL or stream.is_finished or stream.is_remote_closed or stream.message == NULL
            or stream.prefix_size < FRAME_PREFIX_BYTES or stream.message_filled >= stream.message_size
            or stream.rest.buffer != NULL and stream.message_filled < stream.rest.at):
        return NULL
    return stream


cdef inline size_t _count_planned(Connection *connection, Stream *stream) noexcept nogil:
    if stream.planned_round == connection.landing_round:
        return stream.planned_bytes
    return stream.message_filled


cdef Stream *_guess_next(Connection *connection, Stream *current) noexcept nogil:
    """Whose frame comes after one of `current`; NULL: no message that is known misses bytes."""
    cdef int32_t stream_id = current.follower_id if current.follower_id else current.id
    cdef Stream *stream
    for _ in range(FOLLOWERS_TRIED):
        stream = _find_receiver(connection, stream_id)
        if stream != NULL and _count_planned(connection, stream) < stream.message_size:
            return stream
        stream = <Stream *> nghttp2_session_get_stream_user_data(connection.session, stream_id)
        if stream == NULL or stream.follower_id == 0 or stream.follower_id == stream_id or stream.follower_id == current.id:
            break
        stream_id = stream.follower_id
    return current if _count_planned(connection, current) < current.message_size else NULL


# --- the layout
cdef inline void _add_piece(Landing *landing, uint8_t *place, size_t size, uint8_t *held) noexcept nogil:
    landing.pieces[landing.n].iov_base, landing.pieces[landing.n].iov_len = place, size
    landing.held[landing.n] = held
    if held != NULL:
        hold_buffer(held)
    landing.n += 1
    landing.size += size


cdef void _add_payload(Connection *connection, Landing *landing, Stream *stream, size_t size) noexcept nogil:
    cdef size_t planned = _count_planned(connection, stream)
    _add_piece(landing, find_place(stream, planned), size,
               stream.rest.buffer if stream.rest.buffer != NULL else stream.message)
    stream.planned_bytes, stream.planned_round = planned + size, connection.landing_round


cdef inline void _add_tail(Landing *landing, uint8_t *tail, size_t size) noexcept nogil:
    _add_piece(landing, tail, size, NULL)
    landing.size -= size


cdef void _add_guesses(Connection *connection, Landing *landing, Stream *current, uint8_t *tail,
                       size_t tail_size) noexcept nogil:
    cdef Stream *stream
    cdef size_t length, missing, planned
    cdef size_t guessed = 0
    cdef int k
    while landing.n_guesses < MAX_GUESSES:
        stream = _guess_next(connection, current)
        if stream == NULL:
            _add_tail(landing, tail, tail_size)
            return
        planned = _count_planned(connection, stream)
        missing = stream.message_size - planned
        length = min(missing, connection.data_frame_bytes)
        if (length == 0 or planned + length > stream.message_capacity
                or landing.size + FRAME_HEAD_BYTES + length > MAX_LANDING_BYTES):
            return
        k = landing.n_guesses
        landing.lengths[k], landing.stream_ids[k], landing.may_end[k] = length, stream.id, length == missing
        guessed += length
        if guessed > connection.landing_bytes:
            landing.is_open = landing.has_rest
            if landing.is_open:
                landing.n_guesses += 1
                _add_piece(landing, landing.heads[k], FRAME_HEAD_BYTES, NULL)
            return
        _add_piece(landing, landing.heads[k], FRAME_HEAD_BYTES, NULL)
        _add_payload(connection, landing, stream, length)
        landing.n_guesses += 1
        current = stream


cdef bint awaits_landing(Connection *connection) noexcept nogil:
    cdef Stream *stream = _find_receiver(connection, connection.data_stream_id)
    return (not connection.is_broken and stream != NULL
            and stream.message_size - stream.message_filled >= MIN_LANDING_BYTES)


cdef int plan_landing(Connection *connection, Landing *landing, uint8_t *tail, size_t tail_size) noexcept nogil:
    cdef Stream *stream = _find_receiver(connection, connection.data_stream_id)
    cdef size_t missing, rest, n
    landing.n = landing.n_guesses = 0
    landing.size = 0
    landing.has_rest = landing.is_open = False
    if stream == NULL or connection.is_broken:
        return 0
    missing = stream.message_size - stream.message_filled
    if missing < MIN_LANDING_BYTES:
        return 0
    connection.landing_round += 1
    rest = connection.data_left
    n = min(min(rest, missing), <size_t> MAX_LANDING_BYTES)
    if rest:
        if (stream.message_filled == stream.message_capacity
                and extend_message(stream, stream.message_filled + n) < 0):
            return 0
        n = min(n, stream.message_capacity - stream.message_filled)
        _add_payload(connection, landing, stream, n)
        landing.has_rest = True
    if n == rest and not (rest and connection.data_ends_stream):
        _add_guesses(connection, landing, stream, tail, tail_size)
    elif n == missing:
        _add_tail(landing, tail, tail_size)
    # a header at the end is worth its read: it brings the reader to where the next payload begins
    if landing.size < MIN_LANDING_BYTES and not landing.is_open and landing.n_guesses < 2:
        clear_landing(landing)
    return landing.n


cdef void clear_landing(Landing *landing) noexcept nogil:
    for i in range(landing.n):
        drop_buffer(landing.held[i])
    landing.n = 0


# --- the judgement
cdef bint _is_guessed(const Landing *landing, int k) noexcept nogil:
    cdef const uint8_t *head = landing.heads[k]
    cdef uint32_t stream_id = <uint32_t> landing.stream_ids[k]
    cdef size_t length = landing.lengths[k]
    return (head[0] == <uint8_t> (length >> 16) and head[1] == <uint8_t> (length >> 8) and head[2] == <uint8_t> length
            and head[3] == 0            # DATA
            and (head[4] == 0 or head[4] == NGHTTP2_FLAG_END_STREAM and landing.may_end[k])
            and head[5] & 0x7F == <uint8_t> (stream_id >> 24) and head[6] == <uint8_t> (stream_id >> 16)
            and head[7] == <uint8_t> (stream_id >> 8) and head[8] == <uint8_t> stream_id)


cdef int _feed_linear(Connection *connection, Landing *landing, int first, size_t size, uint8_t *linear,
                      int64_t now_ns) noexcept nogil:
    """Feeds `size` bytes from piece `first` on, moved together: they are not what the places were for."""
    cdef size_t filled = 0, n
    cdef int i = first
    while filled < size:
        n = min(landing.pieces[i].iov_len, size - filled)
        memcpy(linear + filled, landing.pieces[i].iov_base, n)
        filled += n
        i += 1
    count_copied(COPY_RECEIVED, size)
    return feed(connection, linear, size, now_ns)


cdef int _feed_pieces(Connection *connection, Landing *landing, size_t size, uint8_t *linear,
                      int64_t now_ns) noexcept nogil:
    cdef size_t in_places = min(size, landing.size)
    cdef size_t tail_size = size - in_places
    cdef size_t n
    cdef int i = 0
    cdef int k
    if landing.has_rest:
        n = min(in_places, landing.pieces[0].iov_len)
        if feed(connection, <const uint8_t *> landing.pieces[0].iov_base, n, now_ns) < 0:
            return -1
        in_places -= n
        i = 1
    for k in range(landing.n_guesses):
        if in_places < FRAME_HEAD_BYTES:
            break
        if not _is_guessed(landing, k):
            connection.landing_bytes //= 2
            if connection.landing_bytes < connection.data_frame_bytes:
                connection.landing_bytes = 0
            break
        if feed(connection, landing.heads[k], FRAME_HEAD_BYTES, now_ns) < 0:
            return -1
        in_places -= FRAME_HEAD_BYTES
        i += 1
        if k == landing.n_guesses - 1:
            connection.landing_bytes = min(max(connection.landing_bytes * 2, <size_t> LEAST_GUESS_BYTES),
                                           <size_t> MAX_LANDING_BYTES)
            if landing.is_open:
                break
        n = min(in_places, landing.lengths[k])
        if n and feed(connection, <const uint8_t *> landing.pieces[i].iov_base, n, now_ns) < 0:
            return -1
        in_places -= n
        i += 1
    if in_places == FRAME_HEAD_BYTES:       # a header that was not guessed, and nothing behind it: not to be moved
        if feed(connection, <const uint8_t *> landing.pieces[i].iov_base, FRAME_HEAD_BYTES, now_ns) < 0:
            return -1
    elif in_places and _feed_linear(connection, landing, i, in_places, linear, now_ns) < 0:
        return -1
    if tail_size:
        return feed(connection, <const uint8_t *> landing.pieces[landing.n - 1].iov_base, tail_size, now_ns)
    return 0


cdef int feed_landing(Connection *connection, Landing *landing, size_t size, uint8_t *linear,
                      int64_t now_ns) noexcept nogil:
    cdef int result = _feed_pieces(connection, landing, size, linear, now_ns)
    clear_landing(landing)
    return result
