"""Target ``landing``: bytes received into their places say what the same bytes say to a linear reader.

Two sessions get the same frames, which are made from the input: big messages on several streams, in turn or not, padded,
cut off, reset, with other frames or nonsense between them. One session is fed in a row, the other through
plan_landing and feed_landing in pieces of the input's choice, with the ends of big messages in rows of a slab. What a
driver finds in them is equal: after each piece, or (then the first gets all bytes at once) in the end.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, free, malloc
from libc.string cimport memcmp, memcpy, memset

from aiorch_server._core.buffers cimport Place, drop_buffer, new_buffer
from aiorch_server._core.grpc_text cimport put_frame_prefix
from aiorch_server._core.h2 cimport *
from aiorch_server._core.h2_answer cimport answer_stream, fail_stream, finish_stream
from aiorch_server._core.h2_landing cimport MAX_LANDING_BYTES, Landing, feed_landing, plan_landing
from aiorch_server._core.h2_request cimport make_slow, take_event, take_message, take_ready
from aiorch_server._core.h2_stream cimport *
from aiorch_server._core.slabs cimport Slab, empty_slab, note_batch, reserve_rows

cdef enum:
    MAX_WIRE_BYTES = 1 << 20
    MAX_SEEN_BYTES = 1 << 21
    MAX_STEPS = 400
    MAX_PIECES_LOOKED_AT = 400
    N_STREAMS = 8               # that the frames' author keeps in mind
    TAIL_BYTES = 64
    HEAD_BYTES = 9
    ROW_BYTES = 1 << 19         # more than most messages

cdef const char *FAST = "/fast/Call"
cdef const char *SLOW = "/slow/Call"


cdef struct Side:
    Group *group
    Connection *connection
    uint8_t *seen               # what a driver has found since the last comparison
    size_t seen_size
    bint is_broken


cdef struct Author:
    const uint8_t *at
    const uint8_t *end
    uint8_t *wire
    size_t size
    uint32_t next_id
    uint32_t random
    size_t last_length
    size_t left[N_STREAMS]      # of each stream's message


cdef void demand(bint is_true, const char *law) noexcept nogil:
    if not is_true:
        fprintf(stderr, "broken: %s\n", law)
        abort()


# --- the frames
cdef inline uint8_t decide(Author *author) noexcept nogil:
    """The next byte of the input; 0 when it is over."""
    if author.at == author.end:
        return 0
    author.at += 1
    return author.at[-1]


cdef inline size_t decide_size(Author *author) noexcept nogil:
    """Small, or as large as what lands."""
    cdef size_t byte = decide(author)
    return byte if byte < 64 else (byte - 63) * 2311


cdef inline bint has_space(Author *author, size_t size) noexcept nogil:
    return author.size + size <= MAX_WIRE_BYTES


cdef void put_head(Author *author, size_t size, uint8_t kind, uint8_t flags, uint32_t id) noexcept nogil:
    cdef uint8_t *head = author.wire + author.size
    head[0], head[1], head[2], head[3], head[4] = size >> 16 & 255, size >> 8 & 255, size & 255, kind, flags
    head[5], head[6], head[7], head[8] = id >> 24 & 255, id >> 16 & 255, id >> 8 & 255, id & 255
    author.size += HEAD_BYTES


cdef void put_bytes(Author *author, const void *data, size_t size) noexcept nogil:
    memcpy(author.wire + author.size, data, size)
    author.size += size


cdef void put_noise(Author *author, size_t size) noexcept nogil:
    """Bytes that differ wherever they are: one that is in the wrong place is seen."""
    cdef uint8_t *at = author.wire + author.size
    for i in range(size):
        author.random = author.random * 1664525 + 1013904223
        at[i] = author.random >> 24
    author.size += size


cdef void put_pair(Author *author, const char *name, uint8_t name_size, const char *value, uint8_t value_size) noexcept nogil:
    """A header as a literal that is not indexed."""
    cdef uint8_t head[2]
    head[0], head[1] = 0, name_size
    put_bytes(author, head, 2)
    put_bytes(author, name, name_size)
    put_bytes(author, &value_size, 1)
    put_bytes(author, value, value_size)


cdef void put_request(Author *author, uint8_t what) noexcept nogil:
    cdef uint8_t *head = author.wire + author.size
    cdef size_t begin, size
    if not has_space(author, 200):
        return
    put_head(author, 0, 1, 4, author.next_id)
    begin = author.size
    put_pair(author, b":method", 7, b"POST", 4)
    put_pair(author, b":scheme", 7, b"http", 4)
    put_pair(author, b":path", 5, SLOW if what & 1 else FAST, 10)
    put_pair(author, b":authority", 10, b"x", 1)
    put_pair(author, b"content-type", 12, b"application/grpc", 16)
    size = author.size - begin
    head[1], head[2] = size >> 8 & 255, size & 255
    author.left[author.next_id // 2 % N_STREAMS] = 0
    author.next_id += 2


cdef void put_data(Author *author, uint32_t id, uint8_t what, uint8_t padding, size_t length) noexcept nogil:
    """One frame of a stream's message, which begins here if none has; the last one may end the request."""
    cdef size_t *left = &author.left[id // 2 % N_STREAMS]
    cdef size_t prefix = 0, whole
    cdef uint8_t flags = 0
    cdef uint8_t head[FRAME_PREFIX_BYTES]
    if not has_space(author, 20000):
        return
    if left[0] == 0:
        left[0] = decide_size(author)
        put_frame_prefix(head, left[0])
        prefix = FRAME_PREFIX_BYTES
    length = min(length, 16384 - FRAME_PREFIX_BYTES - 1 - padding if what & 1 or prefix else 16384)
    if not what & 4:
        length = min(length, left[0])
    left[0] -= min(length, left[0])
    if left[0] == 0 and not what & 8 or what & 48 == 48:    # with the message, or too early
        flags |= 1
    whole = length + prefix
    if what & 1:
        flags |= 8
        whole += 1 + <size_t> padding
    put_head(author, whole, 0, flags, id)
    if what & 1:
        put_bytes(author, &padding, 1)
    put_bytes(author, head, prefix)
    put_noise(author, length)
    if what & 1:
        memset(author.wire + author.size, 0, padding)
        author.size += padding
    author.last_length = length


cdef uint32_t pick_id(Author *author, uint8_t byte) noexcept nogil:
    cdef uint32_t back = 2 * (byte & 7)
    return author.next_id - 2 - back if author.next_id > back + 2 else 1


cdef void put_step(Author *author) noexcept nogil:
    cdef uint8_t step = decide(author), what, of
    cdef uint8_t payload[8]
    cdef size_t length, k, n
    step = step % 16
    what = decide(author)
    if step <= 3:
        put_request(author, what)
    elif step <= 6:
        of = decide(author)
        length = author.last_length if of & 64 else decide_size(author)
        put_data(author, pick_id(author, of), what, of if what & 2 else 0, length)
    elif step <= 11:            # frames of so many streams in turn, as clients send messages at the same time
        of = decide(author)
        length = 16384 if of & 128 else decide_size(author)
        n = 1 + (what & 31)
        for k in range(n):
            put_data(author, pick_id(author, <uint8_t> (k % (1 + (of & 3)))), (of & 12) if k + 1 == n else 0, 0, length)
    elif not has_space(author, 300):
        return
    elif step == 12:
        put_head(author, 4, 3, 0, pick_id(author, what))
        payload[0], payload[1], payload[2], payload[3] = 0, 0, 0, what >> 4
        put_bytes(author, payload, 4)
    elif step == 13:
        memset(payload, what, 8)
        put_head(author, 8, 6, what & 1, 0)
        put_bytes(author, payload, 8)
    elif step == 14:            # any frame
        length = decide(author)
        of = decide(author)
        put_head(author, length, what, of, pick_id(author, decide(author)))
        put_noise(author, length)
    else:                       # what is no frame at all
        length = min(<size_t> what, <size_t> (author.end - author.at))
        put_bytes(author, author.at, length)
        author.at += length


# --- the driver: the same for both
cdef void note(Side *side, const void *data, size_t size) noexcept nogil:
    size = min(size, MAX_SEEN_BYTES - side.seen_size)
    memcpy(side.seen + side.seen_size, data, size)
    side.seen_size += size


cdef void note_number(Side *side, uint64_t number) noexcept nogil:
    note(side, &number, 8)


cdef uint64_t mark_bytes(const uint8_t *data, size_t size, uint64_t mark) noexcept nogil:
    for i in range(size):
        mark = (mark ^ data[i]) * 1099511628211ULL
    return mark


cdef void note_message(Side *side, const uint8_t *data, size_t size) noexcept nogil:
    note_number(side, size)
    note_number(side, mark_bytes(data, size, 14695981039346656037ULL))


cdef void note_parts(Side *side, Stream *stream) noexcept nogil:
    """As note_message: what has come of a message, wherever it lies."""
    cdef size_t size = stream.message_filled
    cdef size_t ahead = size if stream.rest.buffer == NULL else min(size, stream.rest.at)
    cdef uint64_t mark = mark_bytes(stream.message, ahead, 14695981039346656037ULL)
    note_number(side, size)
    note_number(side, mark_bytes(stream.rest.data, size - ahead, mark))


cdef uint8_t *make_answer() noexcept nogil:
    cdef uint8_t *frame = new_buffer(FRAME_PREFIX_BYTES + 3, 0)
    demand(frame != NULL, "there is memory")
    put_frame_prefix(frame, 3)
    memcpy(frame + FRAME_PREFIX_BYTES, b"yes", 3)
    return frame


cdef void look_at_requests(Side *side) noexcept nogil:
    cdef Stream *stream = take_ready(side.connection)
    while stream != NULL:
        note_number(side, <uint64_t> stream.id)
        if stream.id % 10 == 5:     # declined
            make_slow(stream)
            stream = take_ready(side.connection)
            continue
        note_parts(side, stream)
        drop_buffer(stream.message)
        drop_buffer(stream.rest.buffer)
        stream.message = stream.rest.buffer = NULL
        if stream.id % 6 == 1:
            fail_stream(stream, 8, b"full", 4)
        else:
            answer_stream(stream, make_answer(), FRAME_PREFIX_BYTES + 3, NULL)
        stream = take_ready(side.connection)


cdef void look_at_events(Side *side, bint is_closing) noexcept nogil:
    """Of the slow calls; one in four reads nothing."""
    cdef uint32_t bits = 0
    cdef Message *message
    cdef Stream *stream = take_event(side.connection, &bits)
    while stream != NULL:
        note_number(side, <uint64_t> stream.id)
        note_number(side, bits)
        stream.owner = NULL if bits & EVENT_OVER else <void *> stream
        if bits & EVENT_OVER:
            release_stream(stream)
        elif not is_closing:
            message = take_message(stream) if stream.id % 8 != 7 else NULL
            while message != NULL:
                note_message(side, message.data, message.size)
                free_message(message)
                message = take_message(stream)
            if bits & EVENT_HALF_CLOSE:
                finish_stream(stream, 0, NULL, 0, NULL, 0)
                detach_owner(stream)
        stream = take_event(side.connection, &bits)


cdef void look_at_bytes(Side *side) noexcept nogil:
    """What is sent, but for WINDOW_UPDATE: when half a window is reached depends on the cuts."""
    cdef uint8_t *sent = <uint8_t *> malloc(MIN_COLLECT_BYTES)
    cdef size_t at, size
    cdef Py_ssize_t n = 1
    demand(sent != NULL, "there is memory")
    while n > 0:
        n = collect(side.connection, sent, MIN_COLLECT_BYTES)
        note_number(side, n < 0)
        at = 0
        while n > 0 and at < <size_t> n:
            size = HEAD_BYTES + (<size_t> sent[at] << 16 | <size_t> sent[at + 1] << 8 | sent[at + 2])
            demand(at + size <= <size_t> n, "frames are collected whole")
            if sent[at + 3] != 8:
                note(side, sent + at, size)
            at += size
    free(sent)


cdef void look(Side *side) noexcept nogil:
    if side.is_broken:
        return
    look_at_requests(side)
    look_at_events(side, False)
    look_at_bytes(side)
    note_number(side, side.connection.n_streams)
    note_number(side, side.connection.partial_bytes)
    note_number(side, side.connection.unread_bytes)
    note_number(side, side.connection.outbound_bytes)
    note_number(side, is_over(side.connection))


cdef void look_at_parts(Side *side) noexcept nogil:
    """The messages that have not come whole."""
    cdef Stream *stream = side.connection.streams
    while stream != NULL and not side.is_broken:
        note_number(side, <uint64_t> stream.id)
        if stream.message != NULL:
            note_parts(side, stream)
        stream = stream.older


cdef size_t align(const uint8_t *head, size_t size, size_t message_size) noexcept nogil:
    """Anywhere in the message: buffers begin at odd places then."""
    return (head[0] if size else 3) % message_size


cdef Slab slab
memset(&slab, 0, sizeof(slab))


cdef bint place(Stream *stream, const uint8_t *head, size_t size, size_t message_size, Place *place) noexcept nogil:
    """From anywhere in what has come, in rows that begin as no message does."""
    cdef uint8_t *dropped = NULL
    cdef bint is_reserved = False
    if size and message_size <= ROW_BYTES and head[0] % 4:
        is_reserved = reserve_rows(&slab, ROW_BYTES, 1, place, &dropped)
    drop_buffer(dropped)
    if not is_reserved:
        return False
    place.at = min(1 + (head[0] // 4 << 8 | head[0]) % size, message_size - 1)
    memset(place.data, 0xEE, message_size - place.at)
    return True


cdef void begin(Side *side, const Limits *limits) noexcept nogil:
    memset(side, 0, sizeof(Side))
    side.group = new_group(limits, <const uint8_t *> FAST, 10, NULL)
    side.seen = <uint8_t *> malloc(MAX_SEEN_BYTES)
    demand(side.group != NULL and side.seen != NULL, "there is memory")
    side.group.find_tensor = align
    side.connection = open_connection(side.group, NULL)
    demand(side.connection != NULL, "there is memory")
    # the wide windows hold from the client's acknowledgement on
    feed(side.connection, <const uint8_t *> b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 33, 1)
    look_at_bytes(side)
    demand(feed(side.connection, <const uint8_t *> b"\0\0\0\4\1\0\0\0\0", 9, 1) == 0, "a greeting is well")


cdef void end(Side *side) noexcept nogil:
    close_connection(side.connection)
    look_at_events(side, True)
    demand(take_ready(side.connection) == NULL, "no stream is ready on a closed connection")
    demand(side.connection.streams == NULL and side.connection.partial_bytes == 0
           and side.connection.unread_bytes == 0 and side.connection.outbound_bytes == 0, "everything comes back")
    free_connection(side.connection)
    release_group(side.group)
    free(side.seen)


cdef void land(Side *side, const uint8_t *data, size_t size, size_t linear_bytes, bint is_guessing,
               uint8_t *linear, uint8_t *tail) noexcept nogil:
    """Gives bytes to the session as an I/O thread reads them."""
    cdef Landing landing
    cdef size_t n, taken
    cdef int result
    while size and not side.is_broken:
        if not is_guessing:
            side.connection.landing_bytes = 0
        if plan_landing(side.connection, &landing, tail, TAIL_BYTES):
            taken = 0
            for i in range(landing.n):
                n = min(landing.pieces[i].iov_len, size - taken)
                memcpy(landing.pieces[i].iov_base, data + taken, n)
                taken += n
            result = feed_landing(side.connection, &landing, taken, linear, 1)
        else:
            taken = min(size, linear_bytes)
            memcpy(linear, data, taken)
            result = feed(side.connection, linear, taken, 1)
        memset(linear, 0xEE, linear_bytes)
        side.is_broken = result < 0
        data += taken
        size -= taken


cdef void compare(Side *linear, Side *landed) noexcept nogil:
    demand(linear.is_broken == landed.is_broken, "both are broken or none")
    demand(linear.is_broken or (linear.seen_size == landed.seen_size
                                and memcmp(linear.seen, landed.seen, linear.seen_size) == 0), "both see the same")
    linear.seen_size = landed.seen_size = 0


cdef int run_landing(const uint8_t *data, size_t size) noexcept nogil:
    cdef Author author
    cdef Side linear
    cdef Side landed
    cdef Limits limits
    cdef uint8_t *buffer
    cdef uint8_t *tail
    cdef size_t cut, at = 0, linear_bytes
    cdef int turn = 0, n = 0
    cdef bint looks_each
    if size < 8:
        return 0
    limits.max_concurrent_streams, limits.max_header_list_bytes = 100, 4096
    limits.max_message_bytes = <size_t> 16384 << (data[0] & 3) * 2
    limits.max_buffered_bytes = <size_t> 65536 << (data[0] >> 2 & 3) * 2
    limits.max_outbound_bytes, limits.high_water_bytes = 1 << 20, 65536
    limits.stream_window_bytes, limits.connection_window_bytes = 1 << 24, 1 << 25
    looks_each = data[0] & 16
    linear_bytes = <size_t> 16 << (data[1] & 15) if data[1] & 15 < 12 else 16384
    memset(&author, 0, sizeof(author))
    author.at, author.end, author.next_id, author.random = data + 8, data + size, 1, 1
    author.wire = <uint8_t *> malloc(MAX_WIRE_BYTES)
    buffer, tail = <uint8_t *> malloc(MAX_LANDING_BYTES), <uint8_t *> malloc(TAIL_BYTES)
    demand(author.wire != NULL and buffer != NULL and tail != NULL, "there is memory")
    while author.at < author.end and n < MAX_STEPS:
        n += 1
        put_step(&author)
    begin(&linear, &limits)
    begin(&landed, &limits)
    landed.group.place_rest = place
    for n in range(8):          # batches of four are usual
        note_batch(&slab, 4)
    n = 0
    if not looks_each:
        linear.is_broken = feed(linear.connection, author.wire, author.size, 1) < 0
    while at < author.size:
        cut = data[2 + turn % 6]
        cut = 1 + cut if cut < 100 else (cut - 99) * 1931
        n += 1
        cut = author.size - at if n > MAX_PIECES_LOOKED_AT else min(cut, author.size - at)
        turn += 1
        land(&landed, author.wire + at, cut, linear_bytes, not data[1] & 16, buffer, tail)
        if looks_each:
            if not linear.is_broken:
                linear.is_broken = feed(linear.connection, author.wire + at, cut, 1) < 0
            look(&linear)
            look(&landed)
            compare(&linear, &landed)
        at += cut
    look(&linear)
    look(&landed)
    look_at_parts(&linear)
    look_at_parts(&landed)
    compare(&linear, &landed)
    end(&linear)
    end(&landed)
    drop_buffer(empty_slab(&slab))
    free(author.wire)
    free(buffer)
    free(tail)
    return 0


TARGETS = {"landing": <size_t> &run_landing}
