# The records of a gRPC session: what a group of connections shares, a connection, a stream; and a stream's life.
#
# See h2.pxd for the whole and for the contract. Nothing here needs the interpreter lock but the two functions on lists.
#
# Ownership of a Stream: the connection's while it is open. Once closed (`connection` is NULL) it lives on only while
# it is in a list, has an `owner` or a `request`; whoever lets go last calls release_stream().

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from aiorch_server._core.buffers cimport Place
from aiorch_server._core.h2_ledger cimport Ledger
from aiorch_server._core.h2_rules cimport Life, LifeRules
from aiorch_server._core.loans cimport LentList, Loan
from aiorch_server._core.nghttp2 cimport nghttp2_option, nghttp2_session, nghttp2_session_callbacks
from aiorch_server._core.passes cimport Pass, PassTable
from aiorch_server._core.request cimport TraceParent
from aiorch_server._core.shares cimport RouteMark
from aiorch_server._core.timers cimport Timer, TimerHeap
from aiorch_server._core.transport cimport PeerIdentity


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef enum:
    FRAME_PREFIX_BYTES = 5      # in front of each gRPC message
    INLINE_METADATA_BYTES = 256
    INLINE_TEXT_BYTES = 64
    PLACED_FROM_BYTES = 65536   # messages whose end may be wanted elsewhere
    MIN_LANDING_BYTES = 4096    # less is received as everything else, see h2_landing
    MAX_OUTLET_PIECES = 160     # two for each DATA frame of a lent array
    LISTED_MESSAGE_BYTES = 64   # what an unread message costs beside its bytes


cdef enum StreamKind:
    STREAM_NEW = 0              # headers are still coming
    STREAM_FAST = 1
    STREAM_SLOW = 2


cdef enum StreamEvent:          # bits
    EVENT_CALL = 1              # a slow call has begun: path and metadata are complete
    EVENT_MESSAGE = 2           # take_message() has something
    EVENT_HALF_CLOSE = 4        # the client sends no more
    EVENT_WRITABLE = 8          # `unsent_bytes` fell below the low-water mark after `wants_writable` was set
    EVENT_OVER = 16             # reset, lost, expired or refused: let go of the stream, answering is pointless


cdef enum StreamEncoding:       # grpc-encoding of the request
    ENCODING_IDENTITY = 0
    ENCODING_GZIP = 1
    ENCODING_DEFLATE = 2
    ENCODING_UNKNOWN = 3


cdef struct Limits:
    size_t max_message_bytes            # one request message, also after decompression
    uint32_t max_concurrent_streams     # per connection
    uint32_t max_header_list_bytes
    uint32_t stream_window_bytes
    uint32_t connection_window_bytes
    size_t max_buffered_bytes           # per connection: messages under assembly; and, apart from that, messages unread
    size_t max_outbound_bytes           # per connection: answers that the client does not take
    size_t high_water_bytes             # per stream: a writer should wait above it; half of it is the low-water mark


# What the connections of one driver thread share. Counted references: each connection holds one.
cdef struct Group:
    Limits limits
    uint8_t *fast_path                  # owned copy; size 0: no fast path
    size_t fast_path_size
    TimerHeap deadlines                 # of streams with grpc-timeout; the driver asks take_due and calls expire_stream
    void (*abandon)(Stream *) noexcept nogil    # must set stream.request to NULL and see to it that it is never used
    # Where in a message the part begins that a model wants aligned (see wire.find_tensor); NULL: nowhere.
    size_t (*find_tensor)(const uint8_t *head, size_t size, size_t message_size) noexcept nogil
    # Where the end of a fast message belongs of which the first bytes have come: true, and a place whose reference becomes
    # the stream's and whose `at` lies within these bytes. NULL, or false: into the message.
    bint (*place_rest)(Stream *stream, const uint8_t *head, size_t size, size_t message_size, Place *place) noexcept nogil
    int64_t in_flight                   # the driver's count of requests that have not come back
    int64_t now_ns                      # of the driver's round: it sets this before it settles answers
    LifeRules rules
    TimerHeap lives                     # of connections, see h2_life.pxd
    uint32_t packed_encodings           # bits of 1 << StreamEncoding: who takes one of them is answered by slow calls
    Ledger *ledger                      # a reference, or NULL
    PassTable *passes                   # a reference; NULL: fast calls need none
    int64_t held_bytes                  # of all connections, as of their last balance
    int64_t booked_bytes                # of these, what is booked in the ledger
    nghttp2_session_callbacks *callbacks
    nghttp2_option *option
    Stream *free_streams
    int n_free
    int references


cdef struct Message:                    # a complete request message of a slow call
    Message *next
    uint8_t *data                       # a buffer, owned
    size_t size
    bint is_compressed


cdef struct Chunk:                      # a framed answer that waits behind the one being sent
    Chunk *next
    uint8_t *data                       # a buffer, owned
    size_t size


# What collect_pieces() fills for one gathering write: runs of the driver's buffer, and lent bytes where they lie.
cdef struct Outlet:
    uint8_t *buffer                     # the driver's
    size_t capacity
    int n
    size_t size                         # of all pieces
    iovec pieces[MAX_OUTLET_PIECES]
    Loan *loans[MAX_OUTLET_PIECES]      # per piece: one reference, or NULL where it lies in the buffer


cdef struct Connection:
    nghttp2_session *session
    Group *group
    void *owner                         # the driver's, not touched here
    int64_t now_ns
    bint is_broken                      # protocol or memory failure: nothing more can be sent
    bint is_draining                    # shutdown notice submitted, final GOAWAY waits for the PING's answer
    Stream *streams
    int n_streams
    int32_t last_stream_id              # the highest that the client has opened
    int n_faults                        # streams that the server had to reset for what the client did
    Stream *ready_head
    Stream *ready_tail
    Stream *event_head
    Stream *event_tail
    size_t partial_bytes                # booked for messages under assembly
    size_t unread_bytes                 # complete messages of slow calls, not yet taken
    size_t withheld_bytes               # received, but not yet given back to the connection's window
    size_t outbound_bytes               # framed answers not yet collected
    int64_t counted_bytes               # of these three, what is in the group's `held_bytes`
    Life life
    PeerIdentity *identity              # a reference: what its handshake has proved, set by the driver; or NULL
    Pass *last_pass                     # a reference, or NULL; see Claim
    # the DATA frame that is coming in, for h2_landing
    int32_t data_stream_id              # 0: none, or one with padding
    size_t data_left
    size_t data_frame_bytes             # what such frames usually hold
    bint data_ends_stream
    uint32_t landing_round
    size_t landing_bytes                # how far ahead of the frame at hand it pays to guess
    # while collect() runs: where send_data writes; and what did not fit into the last buffer
    uint8_t *buffer
    size_t buffer_size
    size_t buffer_capacity
    Outlet *outlet                      # or NULL: everything goes into the buffer
    const uint8_t *pending
    size_t pending_size


cdef struct Stream:
    int32_t id
    Connection *connection              # NULL once the stream is closed
    Group *group
    Stream *older                       # the connection's list
    Stream *newer
    Stream *next_ready
    Stream *next_event
    StreamKind kind
    StreamEncoding encoding
    uint32_t accepted                   # bits of 1 << StreamEncoding that the client takes, beside identity
    uint32_t events
    bint is_ready_listed
    bint is_event_listed
    # what the headers said
    bint is_post
    bint is_grpc
    bint is_fast_path
    bint has_bad_timeout
    size_t header_list_bytes
    int64_t opened_ns
    int64_t timeout_ns                  # -1: none
    bint wants_timing                   # of its answer, which Python writes
    TraceParent parent
    RouteMark mark                      # its route key; and, once a driver has chosen, the version
    int n_credentials                   # `authorization` headers; and where in `metadata` the last one's value is
    size_t credential_at
    size_t credential_size
    # the request
    bint is_remote_closed               # END_STREAM was received
    bint has_message                    # fast: the one message is complete
    bint is_message_compressed
    uint8_t prefix[FRAME_PREFIX_BYTES]
    int prefix_size
    uint8_t *message                    # a buffer, owned: under assembly, or (fast) complete
    size_t message_size                 # as the prefix says
    size_t message_filled
    size_t message_capacity
    size_t message_booked               # of the connection's partial_bytes
    size_t message_align                # which of its bytes is aligned
    Place rest                          # owned: where its end lies; the driver takes it together with `message`
    int32_t follower_id                 # the stream whose DATA came after this one's; 0: not known
    size_t planned_bytes                # of the message, in the landing that is being laid out
    uint32_t planned_round
    Message *inbox_head                 # slow: complete messages
    Message *inbox_tail
    size_t unconsumed_bytes             # received, but not yet given back to the stream's window
    int64_t received_ns                 # when the message was complete
    Timer deadline
    # the driver's
    void *owner                         # a slow call's object
    void *request                       # a fast call's request in flight
    # the answer
    bint is_head_sent
    bint is_finished                    # status is known, nothing can be added
    bint is_deferred                    # nghttp2 waits for resume
    bint wants_writable
    int status
    uint8_t *out                        # a buffer, owned: the framed message being sent
    size_t out_size                     # with what is lent
    size_t out_sent
    size_t out_own_sent                 # of the buffer's own bytes
    LentList *lent                      # owned: what comes between the buffer's bytes, or NULL
    int lent_at                         # the piece that is next
    size_t lent_sent                    # of that piece
    Chunk *out_head
    Chunk *out_tail
    size_t unsent_bytes
    uint8_t *status_text                # percent-encoded; owned unless it is inline
    size_t status_text_size
    uint8_t *trailing                   # packed metadata, owned
    size_t trailing_size
    # packed metadata: uint32 name size, uint32 value size, name, value, and so on; ":path" is in it for slow calls, and
    # ":choice" (a Choice) where the driver has chosen a version: no client can send a name like these
    uint8_t *metadata
    size_t metadata_size
    size_t metadata_capacity
    # not cleared when a stream is reused
    uint8_t inline_metadata[INLINE_METADATA_BYTES]
    uint8_t inline_text[INLINE_TEXT_BYTES]


# --- packed metadata; as lists of (name, value), both bytes, with the interpreter lock
cdef list unpack_metadata(const uint8_t *packed, size_t size)
cdef bytes pack_metadata(object pairs)
# Appends one pair to the stream's own; -1 when memory ran out.
cdef int keep_metadata(Stream *stream, const uint8_t *name, size_t name_size,
                       const uint8_t *value, size_t value_size) noexcept nogil

# --- the life of a stream
# A cleared stream in the connection's list, or NULL when memory ran out.
cdef Stream *new_stream(Connection *connection, int32_t stream_id) noexcept nogil
# Takes the stream out of its connection: frees messages and answers, abandons the request, tells the owner.
cdef void close_stream(Stream *stream) noexcept nogil
# Frees a closed stream that nobody holds; otherwise does nothing.
cdef void release_stream(Stream *stream) noexcept nogil
# The owner wants nothing more from the stream (it has finished it): unread messages are dropped, no events follow.
cdef void detach_owner(Stream *stream) noexcept nogil
# Adds bits of StreamEvent and puts the stream into the connection's list of events.
cdef void push_event(Stream *stream, uint32_t event) noexcept nogil

# --- parts of it; the stream is open
# Frees the message under assembly (or complete, on the fast path) and takes it off the books.
cdef void drop_message(Stream *stream) noexcept nogil
# Copies a complete message that lies in two places into one; -1: no memory, nothing has changed.
cdef int join_message(Stream *stream) noexcept nogil
cdef void drop_inbox(Stream *stream) noexcept nogil
cdef void drop_outbound(Stream *stream) noexcept nogil
cdef void free_message(Message *message) noexcept nogil
# Gives the connection's window back what was withheld, once the unread messages are few enough.
cdef void release_window(Connection *connection) noexcept nogil


cdef inline uint8_t *find_place(Stream *stream, size_t at) noexcept nogil:
    if stream.rest.buffer != NULL and at >= stream.rest.at:
        return stream.rest.data + (at - stream.rest.at)
    return stream.message + at


cdef inline size_t held_bytes(Connection *connection) noexcept nogil:
    return connection.partial_bytes + connection.unread_bytes + connection.outbound_bytes


cdef inline bint takes_answers(Stream *stream) noexcept nogil:
    return stream.connection != NULL and not stream.is_finished


# The limits of a server's sessions as Python gives them; keywords are the fields' names.
cdef class SessionLimits:
    cdef Limits limits
