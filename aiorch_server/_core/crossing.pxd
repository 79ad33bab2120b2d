# The way between an I/O thread and the asyncio plane, for the calls that the compiled path does not carry.
#
# Events go from the I/O thread to the loop, commands from the loop to the I/O thread: two lists under one lock that is
# held for the exchange of a few pointers, by nobody who waits for the interpreter, and one eventfd for each side. The
# planes share no stream. Each call has a Link: one side's fields are never touched by the other, see below.
#
# Life of a link: made by the I/O thread with EVENT_CALL; told at most once, and last, EVENT_OVER; ended exactly once by
# the loop, with COMMAND_FINISH or, when it was told that the call is over, with COMMAND_RELEASE. Counted references: the
# I/O thread's until the end has come, the call object's, one for each event and command on its way.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t

from aiorch_server._core.h2_stream cimport Message, Stream
from aiorch_server._core.request cimport pthread_mutex_t
from aiorch_server._core.transport cimport PeerIdentity


cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        unsigned short sa_family
    struct sockaddr_storage:
        unsigned short ss_family


cdef enum ThreadEvent:          # beside the bits of StreamEvent; `link` is NULL
    EVENT_IDLE = 256            # draining, and no connection is open any more


cdef enum CommandKind:
    COMMAND_READ = 0            # a message of `size` bytes was taken
    COMMAND_HEAD = 1            # `data` is packed metadata
    COMMAND_MESSAGE = 2         # `data` is a framed message
    COMMAND_WANT_WRITABLE = 3   # EVENT_WRITABLE is wanted
    COMMAND_FINISH = 4          # `data` is the status text, `more` packed metadata
    COMMAND_RELEASE = 5
    # to the thread; `link` is NULL
    COMMAND_DRAIN = 6           # close the listeners, tell all clients to open no more streams
    COMMAND_CANCEL_CALLS = 7    # answer all open calls with `code` and the text in `data`
    COMMAND_ABORT = 8           # close all connections
    COMMAND_STOP = 9            # the same, and end the thread


cdef struct Event:
    Event *next
    uint32_t bits
    Link *link                  # a reference
    uint8_t *data               # EVENT_MESSAGE: the message, a buffer, owned
    size_t size
    bint is_compressed


cdef struct Command:
    Command *next
    CommandKind kind
    Link *link                  # a reference
    int code
    uint8_t *data               # a buffer, owned; `more` as well
    size_t size
    uint8_t *more               # owned
    size_t more_size


cdef struct Link:
    int references
    # constant
    int64_t deadline_ns
    int encoding
    uint32_t accepted
    sockaddr_storage peer
    socklen_t peer_size
    PeerIdentity *identity      # a reference; NULL: plaintext
    uint8_t *metadata           # packed
    size_t metadata_size
    # embedded, so that the end can always be said
    Event over
    Command end
    # the I/O thread's
    Stream *stream              # NULL once finished or over
    void *connection            # NULL once that is closed
    Link *older                 # the connection's list of links that were not ended
    Link *newer
    Message *last_handed        # in the stream's inbox: what lies behind it is not told yet
    size_t handed_bytes         # of messages that were told and not read
    size_t applied_bytes        # of answers given to the stream
    bint is_orphan              # EVENT_OVER was told
    # both, atomically: of the answers, what has left the stream; as of the last EVENT_WRITABLE
    size_t sent_bytes
    # the loop's
    void *call                  # its object, borrowed
    bint is_ended


cdef struct Crossing:
    pthread_mutex_t lock
    Event *events_head
    Event *events_tail
    Command *commands_head
    Command *commands_tail
    int events_fd               # readable: there are events
    int commands_fd
    bint are_events_signalled
    bint are_commands_signalled
    bint is_closed              # nobody takes commands any more


# NULL when memory or descriptors ran out.
cdef Crossing *new_crossing() noexcept nogil
# Only when neither side uses it any more.
cdef void free_crossing(Crossing *crossing) noexcept nogil

cdef Link *new_link(const uint8_t *metadata, size_t metadata_size) noexcept nogil
cdef void retain_link(Link *link) noexcept nogil
cdef void release_link(Link *link) noexcept nogil

# With a reference to the link of their own; NULL when memory ran out.
cdef Event *new_event(Link *link, uint32_t bits) noexcept nogil
cdef Command *new_command(Link *link, CommandKind kind) noexcept nogil
cdef void free_event(Event *event) noexcept nogil
cdef void free_command(Command *command) noexcept nogil

# Takes over a chain and wakes the loop once.
cdef void put_events(Crossing *crossing, Event *first, Event *last) noexcept nogil
cdef Event *take_events(Crossing *crossing) noexcept nogil
# Takes over the command; when closed, frees it, as `discard_command` does.
cdef void put_command(Crossing *crossing, Command *command) noexcept nogil
cdef Command *take_commands(Crossing *crossing) noexcept nogil
# No command is carried out any more: what waits and what will come is discarded. The I/O thread has ended.
cdef void close_commands(Crossing *crossing) noexcept nogil

cdef extern from * nogil:
    """
    static inline void aiorch_store_size(size_t *at, size_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
    static inline size_t aiorch_load_size(const size_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
    """
    void aiorch_store_size(size_t *at, size_t value)
    size_t aiorch_load_size(const size_t *at)
