"""Targets ``session`` and ``frames``: an HTTP/2 session under a driver that does what drivers do, in any order.

``session`` gives the bytes as they are to the session, cut into pieces; ``frames`` makes frames of them, most of them
such as real clients send, so that it comes far behind the first header. Both read what the driver decides from a tape,
a part of the input. Whatever happens, the driver's laws hold (see `demand`), and in the end the books are clear.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, calloc, free, malloc
from libc.string cimport memcpy, memset

from aiorch_server._core.buffers cimport drop_buffer, new_buffer
from aiorch_server._core.grpc_text cimport put_frame_prefix
from aiorch_server._core.h2 cimport *
from aiorch_server._core.h2_answer cimport (
    answer_stream,
    expire_stream,
    fail_stream,
    finish_stream,
    revoke_stream,
    send_head,
    send_message,
)
from aiorch_server._core.h2_landing cimport MAX_LANDING_BYTES, Landing, feed_landing, plan_landing
from aiorch_server._core.h2_ledger cimport Ledger, ServerLedger
from aiorch_server._core.h2_life cimport begin_life, tend_due
from aiorch_server._core.h2_request cimport make_slow, take_event, take_message, take_ready
from aiorch_server._core.h2_rules cimport LifeRules
from aiorch_server._core.h2_stream cimport *
from aiorch_server._core.loans cimport LentList, lend_buffer, new_lent_list
from aiorch_server._core.timers cimport next_due, take_due

cdef enum:
    MAX_WIRE_BYTES = 1 << 19    # what one input can make of itself
    MAX_STEPS = 4000
    TAIL_BYTES = 512            # behind the messages of a landing
    MAX_STREAMS = 64            # that the frames' author keeps in mind

cdef const char *FAST = "/fast/Call"
cdef const char *SLOW = "/slow/Call"


cdef ServerLedger shared = ServerLedger(max_bytes=1 << 16)
cdef Ledger *ledger = shared.ledger


cdef struct Tape:
    const uint8_t *at
    const uint8_t *end


cdef struct Holder:             # of a slow call, or of a fast request: what a driver would keep
    Stream *stream
    Holder *next
    bint is_request
    bint is_over
    bint has_begun


cdef struct Player:
    Tape tape
    Group *group
    Connection *connection
    int64_t now_ns
    Holder *holders
    int n_holders
    uint8_t *out
    uint8_t *linear
    Outlet outlet
    bint gathers                # writes as an I/O thread does
    # frames only: bytes that the client will send
    uint8_t *wire
    size_t wire_size
    uint32_t next_id


cdef void demand(bint is_true, const char *law) noexcept nogil:
    if not is_true:
        fprintf(stderr, "broken: %s\n", law)
        abort()


cdef inline uint8_t decide(Player *player) noexcept nogil:
    """The next byte of the tape; 0 when it is over."""
    cdef uint8_t byte
    if player.tape.at == player.tape.end:
        return 0
    byte = player.tape.at[0]
    player.tape.at += 1
    return byte


cdef inline size_t decide_size(Player *player) noexcept nogil:
    """Mostly small, sometimes around what a window or a buffer holds."""
    cdef size_t byte = decide(player)
    if byte < 200:
        return byte
    return (byte - 199) * 1237


cdef uint8_t *make_frame(size_t size) noexcept nogil:
    cdef uint8_t *frame = new_buffer(FRAME_PREFIX_BYTES + size, 0)
    demand(frame != NULL, "there is memory")
    put_frame_prefix(frame, size)
    memset(frame + FRAME_PREFIX_BYTES, 0x61, size)
    return frame


cdef void answer_lent(Stream *stream, size_t size) noexcept nogil:
    """All but the last byte on loan, in two pieces of one buffer."""
    cdef LentList *lent = new_lent_list(2)
    cdef uint8_t *frame = new_buffer(FRAME_PREFIX_BYTES + 1, 0)
    cdef uint8_t *content = new_buffer(size, 0)
    demand(lent != NULL and frame != NULL and content != NULL, "there is memory")
    put_frame_prefix(frame, size)
    frame[FRAME_PREFIX_BYTES] = 0x61
    memset(content, 0x62, size)
    lent.n, lent.size = 2, size - 1
    for i in range(2):
        lent.items[i].at, lent.items[i].loan = FRAME_PREFIX_BYTES, lend_buffer(content, size)
        demand(lent.items[i].loan != NULL, "there is memory")
    lent.items[0].data, lent.items[0].size = content, size // 2
    lent.items[1].data, lent.items[1].size = content + size // 2, size - 1 - size // 2
    drop_buffer(content)
    answer_stream(stream, frame, FRAME_PREFIX_BYTES + size, lent)


# --- the driver: what h2.pxd asks of it
cdef Holder *hold(Player *player, Stream *stream, bint is_request) noexcept nogil:
    cdef Holder *holder = <Holder *> calloc(1, sizeof(Holder))
    demand(holder != NULL, "there is memory")
    holder.stream, holder.is_request, holder.next = stream, is_request, player.holders
    player.holders = holder
    player.n_holders += 1
    return holder


cdef void let_go(Player *player, Holder *holder) noexcept nogil:
    cdef Holder **at = &player.holders
    while at[0] != holder:
        at = &at[0].next
    at[0] = holder.next
    player.n_holders -= 1
    free(holder)


cdef void abandon(Stream *stream) noexcept nogil:
    cdef Holder *holder = <Holder *> stream.request
    demand(holder != NULL and holder.is_request and not holder.is_over, "a request is abandoned once")
    holder.is_over = True
    stream.request = NULL
    stream.group.in_flight -= 1


cdef void check_stream(Stream *stream) noexcept nogil:
    cdef size_t at = 0
    cdef uint32_t sizes[2]
    while at < stream.metadata_size:
        demand(stream.metadata_size - at >= 8, "packed metadata is whole")
        memcpy(sizes, stream.metadata + at, 8)
        at += 8 + <size_t> sizes[0] + sizes[1]
    demand(at == stream.metadata_size, "packed metadata is whole")
    demand(stream.header_list_bytes <= stream.group.limits.max_header_list_bytes, "a call's headers are within bounds")


cdef void act(Player *player, Holder *holder) noexcept nogil:
    """Something that a servicer or an instance does to what it holds."""
    cdef Stream *stream = holder.stream
    cdef Message *message
    cdef uint8_t packed[16]
    cdef uint32_t sizes[2]
    cdef size_t size
    cdef uint8_t what = decide(player)
    if holder.is_request:
        if holder.is_over:      # abandoned meanwhile: the answer is dropped
            let_go(player, holder)
            return
        demand(stream.request == holder, "a request stays with its stream")
        stream.request = NULL
        player.group.in_flight -= 1
        let_go(player, holder)
        if what & 1:
            fail_stream(stream, what >> 4, b"went \xc3\xbc wrong", 13)
        else:
            size = decide_size(player)
            if what & 2 and size > 2:
                answer_lent(stream, size)
            else:
                answer_stream(stream, make_frame(size), FRAME_PREFIX_BYTES + size, NULL)
        return
    sizes[0], sizes[1] = 1, 2
    memcpy(packed, sizes, 8)
    memcpy(packed + 8, b"kvv", 3)
    if what % 8 <= 1:
        message = take_message(stream)
        if message != NULL:
            demand(message.size <= player.group.limits.max_message_bytes, "messages are within bounds")
            demand(not message.is_compressed or stream.encoding != ENCODING_IDENTITY, "compressed as announced")
            free_message(message)
    elif what % 8 == 2:
        send_head(stream, packed, 11)
    elif what % 8 <= 4:
        size = decide_size(player)
        send_message(stream, make_frame(size), FRAME_PREFIX_BYTES + size)
        stream.wants_writable = what % 8 == 4
    elif what % 8 == 5:
        stream.wants_writable = True
    elif what % 8 == 6:
        finish_stream(stream, what >> 4, b"done", 4 if what & 8 else 0, packed, 11 if what & 128 else 0)
        let_go(player, holder)
        detach_owner(stream)
    else:
        revoke_stream(stream, 14, b"taken back")


cdef void take_events(Player *player, bint is_closing) noexcept nogil:
    cdef uint32_t bits = 0
    cdef Holder *holder
    cdef Stream *stream = take_event(player.connection, &bits)
    while stream != NULL:
        demand(bits != 0, "an event says something")
        holder = <Holder *> stream.owner
        demand(holder == NULL or (holder.stream == stream and not holder.is_request), "an owner is its stream's")
        if holder == NULL:
            demand((bits & EVENT_CALL) != 0, "a call begins with EVENT_CALL")
            demand(not is_closing, "no call begins on a closed connection")
            demand(stream.connection == player.connection and stream.kind == STREAM_SLOW, "a call is open")
            check_stream(stream)
            holder = hold(player, stream, False)
            stream.owner = holder
        else:
            demand((bits & EVENT_CALL) == 0, "a call begins once")
        if bits & EVENT_OVER:
            stream.owner = NULL
            let_go(player, holder)
            release_stream(stream)
        elif not is_closing and decide(player) & 1:
            act(player, holder)
        stream = take_event(player.connection, &bits)


cdef void take_requests(Player *player) noexcept nogil:
    cdef Stream *stream = take_ready(player.connection)
    cdef uint8_t what
    while stream != NULL:
        demand(stream.connection == player.connection and stream.request == NULL, "a ready stream is open and free")
        demand(stream.message_size == 0 or stream.message != NULL, "a ready stream has its message")
        demand(stream.message_size <= player.group.limits.max_message_bytes, "messages are within bounds")
        check_stream(stream)
        what = decide(player) % 5
        if what == 4:
            make_slow(stream)
        elif what == 3:
            fail_stream(stream, 8, b"full", 4)
        else:
            drop_buffer(stream.message)
            stream.message = NULL
            stream.request = hold(player, stream, True)
            player.group.in_flight += 1
        stream = take_ready(player.connection)


cdef Py_ssize_t gather_pieces(Player *player) noexcept nogil:
    """As a gathering write reads them."""
    cdef Outlet *outlet = &player.outlet
    cdef Py_ssize_t n = collect_pieces(player.connection, outlet)
    cdef const uint8_t *piece
    cdef Py_ssize_t total = 0
    cdef size_t at
    if n < 0:
        demand(outlet.n == 0, "nothing is held for a broken connection")
        return n
    demand(0 <= outlet.n <= MAX_OUTLET_PIECES, "pieces are within bounds")
    for i in range(outlet.n):
        piece = <const uint8_t *> outlet.pieces[i].iov_base
        total += <Py_ssize_t> outlet.pieces[i].iov_len
        for at in range(outlet.pieces[i].iov_len if outlet.loans[i] != NULL else 0):
            demand(piece[at] == 0x62, "what is lent is what was answered")
    demand(total == n, "all pieces are counted")
    clear_outlet(outlet)
    return n


cdef void collect_all(Player *player, size_t limit) noexcept nogil:
    cdef Py_ssize_t n = 1
    cdef size_t total = 0
    while n > 0 and total < limit:
        if player.gathers:
            n = gather_pieces(player)
        else:
            n = collect(player.connection, player.out, MIN_COLLECT_BYTES)
            demand(n <= <Py_ssize_t> MIN_COLLECT_BYTES, "collect keeps within its buffer")
        total += <size_t> n if n > 0 else 0
        demand(total < 1 << 26, "collect comes to an end")


cdef void play_round(Player *player) noexcept nogil:
    """What a driver does after it has read."""
    cdef uint8_t what = decide(player)
    cdef Holder *holder
    cdef Stream *stream
    cdef Limits *limits = &player.group.limits
    player.group.now_ns = player.now_ns
    take_events(player, False)
    take_requests(player)
    holder = player.holders
    while holder != NULL and what & 3:      # one of those that it holds
        what -= 1
        if holder.next == NULL:
            break
        holder = holder.next
    if holder != NULL and not what & 4:
        act(player, holder)
    if what & 8:
        player.now_ns += <int64_t> 1 << (what >> 3)
        stream = <Stream *> take_due(&player.group.deadlines, player.now_ns)
        while stream != NULL:
            demand(stream.connection == player.connection, "a deadline is that of an open stream")
            expire_stream(stream)
            stream = <Stream *> take_due(&player.group.deadlines, player.now_ns)
        while tend_due(player.group, player.now_ns) != NULL:
            pass
    if what == 0xF0:
        drain_connection(player.connection)
    elif what == 0xF1:
        finish_drain(player.connection)
    if not what & 16:
        collect_all(player, 1 << 25)
    elif what & 32:
        collect_all(player, 1)
    demand(player.connection.partial_bytes <= limits.max_buffered_bytes, "messages under assembly are within bounds")


cdef bint begin(Player *player, const uint8_t *data, size_t size) noexcept nogil:
    cdef Limits limits
    cdef LifeRules rules
    cdef bint has_rules
    cdef size_t tape_size
    if size < 4:
        return False
    memset(player, 0, sizeof(Player))
    limits.max_concurrent_streams = 1 + (data[0] & 31)
    limits.max_message_bytes = 1 << (6 + (data[0] >> 5) * 2)
    limits.max_header_list_bytes = 256 << (data[1] & 7)
    limits.max_buffered_bytes = 512 << (data[1] >> 4)
    limits.max_outbound_bytes = 4096 << (data[1] >> 5)
    limits.stream_window_bytes = 65535 if data[1] & 8 else 1 << 18
    limits.connection_window_bytes = 65535 if data[1] & 16 else 1 << 20
    limits.high_water_bytes = 1024
    player.gathers = data[2] & 1
    tape_size = data[2] | <size_t> (data[3] & 127) << 8
    has_rules = data[3] & 128
    data += 4
    size -= 4
    if tape_size > size:
        tape_size = size
    player.tape.at, player.tape.end = data, data + tape_size
    player.now_ns, player.next_id = 1, 1
    player.out = <uint8_t *> malloc(MIN_COLLECT_BYTES)
    player.outlet.buffer, player.outlet.capacity = player.out, MIN_COLLECT_BYTES
    player.linear = <uint8_t *> malloc(MAX_LANDING_BYTES + TAIL_BYTES)
    player.group = new_group(&limits, <const uint8_t *> FAST, 10, abandon)
    demand(player.out != NULL and player.linear != NULL and player.group != NULL, "there is memory")
    if has_rules:
        memset(&rules, 0, sizeof(rules))
        rules.keepalive_time_ns, rules.keepalive_timeout_ns = 1 << 24, 1 << 20
        rules.permit_without_calls, rules.min_ping_interval_ns, rules.max_ping_strikes = size & 1, 1 << 20, 2
        rules.max_idle_ns, rules.max_age_ns, rules.max_age_grace_ns = 1 << 28, 1 << 30, 1 << 20
        rules.stall_ns = 1 << 26
        set_rules(player.group, &rules, ledger, 1 << ENCODING_GZIP)
    player.connection = open_connection(player.group, NULL)
    demand(player.connection != NULL, "there is memory")
    demand(not has_rules or begin_life(player.connection, player.now_ns) == 0, "there is memory")
    return True


cdef void end(Player *player) noexcept nogil:
    """The socket is gone: everything comes back."""
    cdef Holder *holder
    cdef Connection *connection = player.connection
    close_connection(connection)
    take_events(player, True)
    demand(take_ready(connection) == NULL, "no stream is ready on a closed connection")
    demand(connection.streams == NULL and connection.n_streams == 0, "no stream is open on a closed connection")
    demand(connection.partial_bytes == 0 and connection.unread_bytes == 0, "no message is left")
    demand(connection.outbound_bytes == 0, "no answer is left")
    demand(player.group.in_flight == 0 and next_due(&player.group.deadlines) == 0, "no request, no deadline is left")
    while player.holders != NULL:
        holder = player.holders
        demand(holder.is_request and holder.is_over, "whoever holds a call was told that it is over")
        let_go(player, holder)
    free_connection(connection)
    demand(player.group.held_bytes == 0, "nothing is held for a connection that is gone")
    release_group(player.group)
    demand(ledger.connections == 0 and ledger.bytes == 0, "the ledger is even in the end")
    free(player.out)
    free(player.linear)
    free(player.wire)


cdef bint feed_pieces(Player *player, const uint8_t *data, size_t size) noexcept nogil:
    """Gives all bytes to the session, cut as the tape says; False: it is broken."""
    cdef Landing landing
    cdef size_t n
    cdef bint may_land
    while size:
        n = decide(player)
        may_land = n & 1
        n = size if n == 0 or n > size else n if n < 200 else min(size, (n - 199) * 300)
        player.now_ns += 1
        if may_land and plan_landing(player.connection, &landing, player.linear + MAX_LANDING_BYTES, TAIL_BYTES):
            n = land(player, &landing, data, n)
            if n == 0:
                return False
        # a copy of its own, so that reading behind the end is seen
        elif not feed_copy(player, data, n):
            return False
        data += n
        size -= n
        play_round(player)
    return True


cdef size_t land(Player *player, Landing *landing, const uint8_t *data, size_t size) noexcept nogil:
    """What one readv would bring; the number of bytes, 0: the session is broken."""
    cdef size_t taken = 0, n
    cdef int i
    for i in range(landing.n):
        n = min(landing.pieces[i].iov_len, size - taken)
        memcpy(landing.pieces[i].iov_base, data + taken, n)
        taken += n
    demand(taken > 0, "a landing has places")
    return taken if feed_landing(player.connection, landing, taken, player.linear, player.now_ns) == 0 else 0


cdef bint feed_copy(Player *player, const uint8_t *data, size_t size) noexcept nogil:
    cdef uint8_t *copy = <uint8_t *> malloc(size)
    cdef int result
    demand(copy != NULL, "there is memory")
    memcpy(copy, data, size)
    result = feed(player.connection, copy, size, player.now_ns)
    memset(copy, 0xDD, size)
    free(copy)
    return result == 0


cdef int run_session(const uint8_t *data, size_t size) noexcept nogil:
    cdef Player player
    if not begin(&player, data, size):
        return 0
    feed_pieces(&player, player.tape.end, <size_t> (data + size - player.tape.end))
    end(&player)
    return 0


# --- the frames' author
cdef void put(Player *player, const void *data, size_t size) noexcept nogil:
    if player.wire_size + size <= MAX_WIRE_BYTES:
        memcpy(player.wire + player.wire_size, data, size)
        player.wire_size += size


cdef void put_head(Player *player, size_t size, uint8_t kind, uint8_t flags, uint32_t id) noexcept nogil:
    cdef uint8_t head[9]
    head[0], head[1], head[2], head[3], head[4] = size >> 16 & 255, size >> 8 & 255, size & 255, kind, flags
    head[5], head[6], head[7], head[8] = id >> 24 & 255, id >> 16 & 255, id >> 8 & 255, id & 255
    put(player, head, 9)


cdef size_t put_pair(uint8_t *out, const char *name, uint8_t name_size, const void *value,
                     uint8_t value_size) noexcept nogil:
    """A header as a literal that is not indexed; both texts shorter than 127 bytes."""
    out[0], out[1] = 0, name_size
    memcpy(out + 2, name, name_size)
    out[2 + name_size] = value_size
    memcpy(out + 3 + name_size, value, value_size)
    return 3 + <size_t> name_size + value_size


cdef uint32_t pick_id(Player *player) noexcept nogil:
    """A stream that was opened, mostly one of the last; seldom another."""
    cdef uint32_t byte = decide(player)
    if byte >= 240:
        return byte - 240
    return player.next_id - 2 - 2 * (byte & 7) if player.next_id > 2 * (byte & 7) + 1 else 1


cdef size_t copy_tape(Player *player, uint8_t *out, size_t most) noexcept nogil:
    cdef size_t size = decide(player), left = <size_t> (player.tape.end - player.tape.at)
    size = min(size, min(left, most))
    memcpy(out, player.tape.at, size)
    player.tape.at += size
    return size


cdef void put_request(Player *player) noexcept nogil:
    cdef uint8_t block[2048]
    cdef uint8_t text[128]
    cdef size_t n = 0, size, first
    cdef uint8_t what = decide(player), more = decide(player)
    cdef uint32_t id = player.next_id
    if what == 255:
        id = pick_id(player)
    else:
        player.next_id += 2
    n += put_pair(block + n, b":method", 7, b"GET" if what == 254 else b"POST", 3 if what == 254 else 4)
    n += put_pair(block + n, b":scheme", 7, b"http", 4)
    n += put_pair(block + n, b":path", 5, SLOW if what & 1 else FAST, 10)
    n += put_pair(block + n, b":authority", 10, b"x", 1)
    if what != 253:
        n += put_pair(block + n, b"content-type", 12, b"application/grpc+proto", 16 if what & 2 else 22)
    if what & 4:
        n += put_pair(block + n, b"grpc-timeout", 12, b"100m" if more & 1 else b"1S", 4 if more & 1 else 2)
    if what & 8:
        n += put_pair(block + n, b"grpc-encoding", 13, b"gzip" if more & 2 else b"identity", 4 if more & 2 else 8)
    if more & 4:
        size = copy_tape(player, text, 126)
        n += put_pair(block + n, b"grpc-timeout", 12, text, <uint8_t> size)
    if more & 8:
        size = copy_tape(player, text, 126)
        n += put_pair(block + n, b"key-bin", 7, text, <uint8_t> size)
    if more & 16:
        memset(text, 0x7A, 126)
        for _ in range(8):
            n += put_pair(block + n, b"long", 4, text, 126)
    if more & 32:
        n += copy_tape(player, block + n, 250)      # whatever HPACK makes of it
    if more & 64:
        first = n // 2
        put_head(player, first, 1, what >> 4 & 1, id)
        put(player, block, first)
        put_head(player, n - first, 9, 0 if more & 128 else 4, id)
        put(player, block + first, n - first)
    else:
        put_head(player, n, 1, (what >> 4 & 1) | 4, id)
        put(player, block, n)


cdef void put_data(Player *player) noexcept nogil:
    cdef uint8_t what = decide(player)
    cdef uint32_t id = pick_id(player)
    cdef size_t size = decide_size(player), said = size, n = 0
    cdef uint8_t pad = 0
    cdef uint8_t payload[16384]
    if size > 16000:
        size = said = 16000
    if what & 2:
        pad = payload[0] = decide(player)
        n = 1
    if not what & 4:        # a message begins here
        if what & 8:
            said = decide_size(player)
        put_frame_prefix(payload + n, said)
        payload[n] = what >> 6
        n += FRAME_PREFIX_BYTES
    if what & 16:
        n += copy_tape(player, payload + n, 64)
    else:
        memset(payload + n, 0x42, size)
        n += size
    memset(payload + n, 0, pad)
    put_head(player, n + pad, 0, (what & 1) | (8 if what & 2 else 0), id)
    put(player, payload, n + pad)


cdef void put_number(Player *player, uint8_t kind, uint32_t id, uint32_t number) noexcept nogil:
    cdef uint8_t payload[4]
    payload[0], payload[1], payload[2], payload[3] = number >> 24, number >> 16 & 255, number >> 8 & 255, number & 255
    put_head(player, 4, kind, 0, id)
    put(player, payload, 4)


cdef bint play_step(Player *player) noexcept nogil:
    """One thing that a client or the driver does; False: the session is broken."""
    cdef uint8_t payload[260]
    cdef uint8_t what = decide(player), flags
    cdef size_t size
    cdef uint32_t id
    cdef bint is_well = True
    what = what % 20
    if what <= 3:
        put_request(player)
    elif what <= 7:
        put_data(player)
    elif what == 8:
        put_number(player, 3, pick_id(player), decide(player) & 15)
    elif what == 9:
        id = 0 if decide(player) & 1 else pick_id(player)
        put_number(player, 8, id, <uint32_t> 1 << (decide(player) & 31))
    elif what == 10:        # SETTINGS: one, or the acknowledgement
        payload[0], payload[1] = 0, decide(player) & 7
        payload[2], payload[3], payload[4], payload[5] = 0, decide(player), decide(player), decide(player)
        size = 0 if payload[1] == 0 else 6
        put_head(player, size, 4, 1 if size == 0 else 0, 0)
        put(player, payload, size)
    elif what == 11:
        memset(payload, 0, 8)
        put_head(player, 8, 6, decide(player) & 1, 0)
        put(player, payload, 8)
    elif what == 12:        # any frame
        flags = decide(player)
        id = pick_id(player)
        what = decide(player)
        size = copy_tape(player, payload, 255)
        put_head(player, size, what, flags, id)
        put(player, payload, size)
    elif what == 13:
        size = copy_tape(player, payload, 255)
        put(player, payload, size)
    else:
        is_well = feed_pieces(player, player.wire, player.wire_size)
        player.wire_size = 0
        play_round(player)
        if what >= 18:
            play_round(player)
    return is_well


cdef int run_frames(const uint8_t *data, size_t size) noexcept nogil:
    cdef Player player
    cdef int steps = 0
    if not begin(&player, data, size):
        return 0
    player.tape.end = data + size       # all of it is tape
    player.wire = <uint8_t *> malloc(MAX_WIRE_BYTES)
    demand(player.wire != NULL, "there is memory")
    put(&player, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24)
    put_head(&player, 0, 4, 0, 0)
    while player.tape.at < player.tape.end and steps < MAX_STEPS:
        steps += 1
        if not play_step(&player):
            break
    feed_pieces(&player, player.wire, player.wire_size)
    play_round(&player)
    end(&player)
    return 0


TARGETS = {"session": <size_t> &run_session, "frames": <size_t> &run_frames}
