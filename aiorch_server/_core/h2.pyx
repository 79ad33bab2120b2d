"""Groups, connections and libnghttp2's callbacks of gRPC sessions; see h2.pxd for the contract."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from aiorch_server._core.h2_answer cimport put_own, send_data
from aiorch_server._core.h2_ledger cimport Ledger, give_place, release_ledger, retain_ledger, take_place
from aiorch_server._core.h2_life cimport (
    balance_books,
    begin_leaving,
    finish_leaving,
    note_idle_frame,
    note_ping,
    note_ping_sent,
    note_reset,
    submit_drain_ping,
)
from aiorch_server._core.h2_request cimport end_request, open_call, take_bytes, take_header, take_ready
from aiorch_server._core.h2_stream cimport MAX_OUTLET_PIECES, MIN_LANDING_BYTES, STREAM_NEW, close_stream, new_stream
from aiorch_server._core.loans cimport drop_loan
from aiorch_server._core.nghttp2 cimport *
from aiorch_server._core.passes cimport release_pass, release_passes, retain_passes
from aiorch_server._core.timers cimport clear_timer, free_timers
from aiorch_server._core.transport cimport release_identity

cdef enum:
    FIRST_LANDING_BYTES = 65536
    MAX_FAULTS = 1000       # CVE-2025-8671: streams a client may make the server reset, which h2_life's bound does not count


# --- what libnghttp2 reports
cdef inline Stream *_find(nghttp2_session *session, int32_t stream_id) noexcept nogil:
    return <Stream *> nghttp2_session_get_stream_user_data(session, stream_id)


cdef void _note_frame(Connection *connection, const nghttp2_frame_hd *head) noexcept nogil:
    """Notes what h2_landing wants to know about DATA frames."""
    cdef Stream *previous
    connection.data_left = 0
    if head.type != NGHTTP2_DATA:
        return
    if head.flags & NGHTTP2_FLAG_PADDED:
        connection.data_stream_id = 0
        return
    if connection.data_stream_id and head.length >= MIN_LANDING_BYTES:
        previous = _find(connection.session, connection.data_stream_id)
        if previous != NULL:
            previous.follower_id = head.stream_id
    connection.data_stream_id, connection.data_left = head.stream_id, head.length
    connection.data_ends_stream = head.flags & NGHTTP2_FLAG_END_STREAM != 0
    if head.length >= MIN_LANDING_BYTES and not connection.data_ends_stream:
        connection.data_frame_bytes = head.length


cdef int _on_begin_frame(nghttp2_session *session, const nghttp2_frame_hd *hd, void *context) noexcept nogil:
    # RFC 9113, 5.1.1: ids only go up. libnghttp2 drops such HEADERS without a word, because an id that was left out
    # looks like a stream that is closed; but then whoever takes it for a call would wait forever.
    cdef Connection *connection = <Connection *> context
    _note_frame(connection, hd)
    if (hd.type == NGHTTP2_HEADERS and hd.stream_id & 1 and hd.stream_id <= connection.last_stream_id
            and _find(session, hd.stream_id) == NULL
            and nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, hd.stream_id, NGHTTP2_STREAM_CLOSED) != 0):
        return NGHTTP2_ERR_CALLBACK_FAILURE
    return 0


cdef int _on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *context) noexcept nogil:
    cdef Stream *stream
    if frame.hd.type != NGHTTP2_HEADERS or frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        return 0
    stream = new_stream(<Connection *> context, frame.hd.stream_id)
    if stream == NULL:
        return NGHTTP2_ERR_CALLBACK_FAILURE
    nghttp2_session_set_stream_user_data(session, stream.id, stream)
    stream.connection.last_stream_id = stream.id
    return 0


cdef int _on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_size,
                    const uint8_t *value, size_t value_size, uint8_t flags, void *context) noexcept nogil:
    cdef Stream *stream
    if frame.hd.type != NGHTTP2_HEADERS or frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        return 0        # trailers of a request mean nothing in gRPC
    stream = _find(session, frame.hd.stream_id)
    if stream == NULL:
        return 0
    if take_header(stream, name, name_size, value, value_size) < 0:
        return NGHTTP2_ERR_CALLBACK_FAILURE
    return 0


cdef int _on_data(nghttp2_session *session, uint8_t flags, int32_t stream_id, const uint8_t *data, size_t size,
                  void *context) noexcept nogil:
    cdef Connection *connection = <Connection *> context
    cdef Stream *stream = _find(session, stream_id)
    connection.data_left -= min(size, connection.data_left)
    if stream != NULL and not stream.is_finished:
        take_bytes(stream, data, size)
    if stream != NULL and stream.inbox_head != NULL:
        stream.unconsumed_bytes += size
    else:
        nghttp2_session_consume_stream(session, stream_id, size)
    if connection.unread_bytes > connection.group.limits.max_buffered_bytes or connection.life.is_held:
        connection.withheld_bytes += size
    else:
        nghttp2_session_consume_connection(session, size)
    return 0


cdef int _on_frame_recv(nghttp2_session *session, const nghttp2_frame *frame, void *context) noexcept nogil:
    cdef Connection *connection = <Connection *> context
    cdef Stream *stream
    if frame.hd.type == NGHTTP2_PING:
        note_ping(connection, frame)
        return 0
    if frame.hd.type == NGHTTP2_RST_STREAM:
        note_reset(connection, _find(session, frame.hd.stream_id))
        return 0
    if frame.hd.type != NGHTTP2_DATA and frame.hd.type != NGHTTP2_HEADERS:
        if frame.hd.type in (NGHTTP2_PRIORITY, NGHTTP2_SETTINGS, NGHTTP2_WINDOW_UPDATE):
            note_idle_frame(connection)
        return 0
    if frame.hd.type == NGHTTP2_DATA and frame.hd.length == 0 and not frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
        note_idle_frame(connection)
        return 0
    connection.life.n_idle_frames = 0
    stream = _find(session, frame.hd.stream_id)
    if stream == NULL:
        return 0
    if stream.kind == STREAM_NEW:
        open_call(stream)
    if frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
        end_request(stream)
    return 0


cdef int _on_frame_send(nghttp2_session *session, const nghttp2_frame *frame, void *context) noexcept nogil:
    cdef Connection *connection = <Connection *> context
    cdef Stream *stream
    if frame.hd.type in (NGHTTP2_DATA, NGHTTP2_HEADERS, NGHTTP2_WINDOW_UPDATE):
        connection.life.pinged_ns, connection.life.n_strikes, connection.life.n_idle_frames = 0, 0, 0
    if frame.hd.type == NGHTTP2_HEADERS and frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
        stream = _find(session, frame.hd.stream_id)
        if stream != NULL and not stream.is_remote_closed:
            # RFC 9113, 8.1: the answer is complete, the rest of the request is not wanted
            nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, stream.id, NGHTTP2_NO_ERROR)
    elif frame.hd.type == NGHTTP2_RST_STREAM:
        if frame.rst_stream.error_code in (NGHTTP2_PROTOCOL_ERROR, NGHTTP2_FLOW_CONTROL_ERROR, NGHTTP2_STREAM_CLOSED):
            connection.n_faults += 1
            if connection.n_faults > MAX_FAULTS:
                return NGHTTP2_ERR_CALLBACK_FAILURE
    elif frame.hd.type == NGHTTP2_PING:
        note_ping_sent(connection, frame)
    elif frame.hd.type == NGHTTP2_GOAWAY and connection.life.is_terminating:
        connection.life.is_terminated = True
    elif frame.hd.type == NGHTTP2_GOAWAY and connection.is_draining:
        # submitted no earlier, because PINGs overtake: its answer must prove that the client has seen the notice
        submit_drain_ping(connection)
    return 0


cdef int _on_stream_close(nghttp2_session *session, int32_t stream_id, uint32_t error_code, void *context) noexcept nogil:
    cdef Stream *stream = _find(session, stream_id)
    if stream != NULL:
        nghttp2_session_set_stream_user_data(session, stream_id, NULL)
        close_stream(stream)
    return 0


# --- groups and connections
cdef Group *new_group(const Limits *limits, const uint8_t *fast_path, size_t fast_path_size,
                      void (*abandon)(Stream *) noexcept nogil) noexcept nogil:
    cdef Group *group = <Group *> calloc(1, sizeof(Group))
    if group == NULL:
        return NULL
    group.references = 1
    group.limits = limits[0]
    group.abandon = abandon
    group.fast_path_size = fast_path_size
    group.fast_path = <uint8_t *> malloc(fast_path_size + 1)
    if (group.fast_path == NULL or nghttp2_session_callbacks_new(&group.callbacks) != 0
            or nghttp2_option_new(&group.option) != 0):
        release_group(group)
        return NULL
    memcpy(group.fast_path, fast_path, fast_path_size)
    nghttp2_session_callbacks_set_on_begin_headers_callback(group.callbacks, _on_begin_headers)
    nghttp2_session_callbacks_set_on_header_callback(group.callbacks, _on_header)
    nghttp2_session_callbacks_set_on_begin_frame_callback(group.callbacks, _on_begin_frame)
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(group.callbacks, _on_data)
    nghttp2_session_callbacks_set_on_frame_recv_callback(group.callbacks, _on_frame_recv)
    nghttp2_session_callbacks_set_on_frame_send_callback(group.callbacks, _on_frame_send)
    nghttp2_session_callbacks_set_on_stream_close_callback(group.callbacks, _on_stream_close)
    nghttp2_session_callbacks_set_send_data_callback(group.callbacks, send_data)
    nghttp2_option_set_no_auto_window_update(group.option, 1)
    nghttp2_option_set_no_closed_streams(group.option, 1)
    # h2_life counts resets: libnghttp2 cannot tell a flood from callers whose time is up
    nghttp2_option_set_stream_reset_rate_limit(group.option, <uint64_t> 1 << 62, <uint64_t> 1 << 62)
    return group


cdef void set_rules(Group *group, const LifeRules *rules, Ledger *ledger, uint32_t packed_encodings) noexcept nogil:
    group.rules = rules[0]
    group.packed_encodings = packed_encodings
    if ledger != NULL:
        retain_ledger(ledger)
    group.ledger = ledger


cdef void set_passes(Group *group, PassTable *passes) noexcept nogil:
    retain_passes(passes)
    group.passes = passes


cdef void release_group(Group *group) noexcept nogil:
    cdef Stream *stream
    group.references -= 1
    if group.references > 0:
        return
    while group.free_streams != NULL:
        stream = group.free_streams
        group.free_streams = stream.next_ready
        free(stream)
    if group.callbacks != NULL:
        nghttp2_session_callbacks_del(group.callbacks)
    if group.option != NULL:
        nghttp2_option_del(group.option)
    free_timers(&group.deadlines)
    free_timers(&group.lives)
    if group.ledger != NULL:
        release_ledger(group.ledger)
    if group.passes != NULL:
        release_passes(group.passes)
    free(group.fast_path)
    free(group)


cdef Connection *open_connection(Group *group, void *owner) noexcept nogil:
    cdef Connection *connection
    cdef nghttp2_settings_entry settings[3]
    if not take_place(group.ledger):
        return NULL
    connection = <Connection *> calloc(1, sizeof(Connection))
    if connection == NULL:
        give_place(group.ledger)
        return NULL
    connection.group, connection.owner = group, owner
    connection.landing_bytes = FIRST_LANDING_BYTES
    if nghttp2_session_server_new2(&connection.session, group.callbacks, connection, group.option) != 0:
        give_place(group.ledger)
        free(connection)
        return NULL
    settings[0].settings_id = NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS
    settings[0].value = group.limits.max_concurrent_streams
    settings[1].settings_id = NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
    settings[1].value = group.limits.stream_window_bytes
    settings[2].settings_id = NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE
    settings[2].value = group.limits.max_header_list_bytes
    if (nghttp2_submit_settings(connection.session, NGHTTP2_FLAG_NONE, settings, 3) != 0
            or nghttp2_session_set_local_window_size(connection.session, NGHTTP2_FLAG_NONE, 0,
                                                     <int32_t> group.limits.connection_window_bytes) != 0):
        nghttp2_session_del(connection.session)
        give_place(group.ledger)
        free(connection)
        return NULL
    group.references += 1
    return connection


cdef void close_connection(Connection *connection) noexcept nogil:
    connection.is_broken = True
    while connection.streams != NULL:
        close_stream(connection.streams)
    take_ready(connection)      # all of them are closed: this lets go of them
    clear_timer(&connection.group.lives, &connection.life.timer)
    balance_books(connection)


cdef void free_connection(Connection *connection) noexcept nogil:
    cdef Group *group = connection.group
    nghttp2_session_del(connection.session)
    give_place(group.ledger)
    release_identity(connection.identity)
    if connection.last_pass != NULL:
        release_pass(connection.last_pass)
    free(connection)
    release_group(group)


cdef int feed(Connection *connection, const uint8_t *data, size_t size, int64_t now_ns) noexcept nogil:
    cdef ssize_t taken
    if connection.is_broken:
        return -1
    connection.now_ns = connection.group.now_ns = now_ns
    if connection.life.is_terminating:
        return 0
    taken = nghttp2_session_mem_recv(connection.session, data, size)
    if taken < 0:
        connection.is_broken = True
        return -1
    balance_books(connection)
    return 0


cdef Py_ssize_t collect(Connection *connection, uint8_t *buffer, size_t capacity) noexcept nogil:
    connection.outlet = NULL
    connection.buffer, connection.buffer_size, connection.buffer_capacity = buffer, 0, capacity
    return -1 if _collect(connection) < 0 else <Py_ssize_t> connection.buffer_size


cdef Py_ssize_t collect_pieces(Connection *connection, Outlet *outlet) noexcept nogil:
    cdef int result
    outlet.n, outlet.size = 0, 0
    connection.outlet = outlet
    connection.buffer, connection.buffer_size, connection.buffer_capacity = outlet.buffer, 0, outlet.capacity
    result = _collect(connection)
    connection.outlet = NULL
    if result < 0:
        clear_outlet(outlet)
        return -1
    return <Py_ssize_t> outlet.size


cdef void clear_outlet(Outlet *outlet) noexcept nogil:
    for i in range(outlet.n):
        if outlet.loans[i] != NULL:
            drop_loan(outlet.loans[i])
    outlet.n, outlet.size = 0, 0


cdef int _collect(Connection *connection) noexcept nogil:
    """Takes what nghttp2 has to say until there is no more, or no more room. -1: broken."""
    cdef ssize_t size
    cdef size_t n
    if connection.is_broken:
        return -1
    while True:
        if connection.pending_size == 0:
            if connection.life.is_terminated:
                break
            size = nghttp2_session_mem_send(connection.session, &connection.pending)
            if size < 0:
                connection.is_broken = True
                return -1
            if size == 0:
                break
            connection.pending_size = <size_t> size
        if connection.outlet != NULL and connection.outlet.n == MAX_OUTLET_PIECES:
            break
        n = min(connection.buffer_capacity - connection.buffer_size, connection.pending_size)
        put_own(connection, connection.pending, n)
        connection.pending += n
        connection.pending_size -= n
        if connection.pending_size:
            break
    balance_books(connection)
    return 0


cdef bint is_over(Connection *connection) noexcept nogil:
    return connection.is_broken or (connection.life.is_terminated and connection.pending_size == 0) or (
        not nghttp2_session_want_read(connection.session) and not nghttp2_session_want_write(connection.session)
        and connection.pending_size == 0)


cdef void drain_connection(Connection *connection) noexcept nogil:
    begin_leaving(connection)


cdef void finish_drain(Connection *connection) noexcept nogil:
    finish_leaving(connection)
