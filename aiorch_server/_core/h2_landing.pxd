# Receiving straight into messages: a driver asks where the next bytes of a connection belong, reads them there with one
# readv, and has them fed. See h2.pxd for the whole.
#
# In the middle of a DATA frame its rest has one place, the message of its stream. What comes behind it is a guess: DATA
# frames of the same length, from the streams in the order of the last time. Each guessed frame header is read beside
# the messages and compared before what follows it counts as received; from the first that differs, the bytes are moved
# to the driver's linear buffer and fed from there. So a wrong guess costs a copy, and how far ahead is guessed follows
# how well that went. libnghttp2 sees all bytes in their order, whatever was guessed; what it says of them is what happens.
#
# A landing holds a reference to each buffer that it points into: whatever happens to a stream while its bytes are fed
# (reset, refused, closed), they stay where they are until all are.

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from aiorch_server._core.h2_stream cimport Connection, iovec


cdef extern from "<sys/uio.h>" nogil:
    Py_ssize_t readv(int fd, const iovec *pieces, int n)


cdef enum:
    FRAME_HEAD_BYTES = 9
    MAX_GUESSES = 16
    MAX_PIECES = 34                 # the rest of a frame, (header, payload) for each guess, the tail
    MAX_LANDING_BYTES = 262144


cdef struct Landing:
    int n                           # of pieces
    int n_guesses
    iovec pieces[MAX_PIECES]
    uint8_t *held[MAX_PIECES]       # per piece: the buffer it lies in, with one reference; or NULL
    bint has_rest                   # piece 0 is the rest of the frame at hand
    bint is_open                    # the last guess is a header alone
    size_t size                     # of all pieces but the tail
    uint8_t heads[MAX_GUESSES][FRAME_HEAD_BYTES]    # read there
    int32_t stream_ids[MAX_GUESSES]
    size_t lengths[MAX_GUESSES]
    bint may_end[MAX_GUESSES]       # the message is complete with this frame: END_STREAM is as good


# Whether enough of a message is still to come.
cdef bint awaits_landing(Connection *connection) noexcept nogil
# Lays out places for the next bytes; the number of pieces, 0: nothing is gained, read into the linear buffer. The tail
# takes what comes behind the messages. What is laid out must be given to feed_landing or to clear_landing.
cdef int plan_landing(Connection *connection, Landing *landing, uint8_t *tail, size_t tail_size) noexcept nogil
# Feeds `size` bytes that were read into the pieces, in order; `linear` has room for MAX_LANDING_BYTES.
# -1: the connection is broken, close the socket.
cdef int feed_landing(Connection *connection, Landing *landing, size_t size, uint8_t *linear,
                      int64_t now_ns) noexcept nogil
cdef void clear_landing(Landing *landing) noexcept nogil
