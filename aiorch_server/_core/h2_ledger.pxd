# What all connections of a server share, whichever thread they belong to: how many there are, and the bytes they hold.
#
# A thread keeps its own count and books a difference only when it exceeds a slack, so small requests never write what
# other threads read. The sum is therefore right to SLACK_BYTES per thread. Counted references: one per Group, one for
# the ServerLedger; everything but the two bounds is atomic.

from libc.stdint cimport int64_t


cdef enum:
    SLACK_BYTES = 1048576


cdef struct Ledger:
    int references
    int64_t max_bytes           # 0: no bound, here and below
    int64_t max_connections
    int64_t bytes               # booked by the threads
    int64_t connections
    int64_t refused_messages
    int64_t refused_connections


cdef void retain_ledger(Ledger *ledger) noexcept nogil
cdef void release_ledger(Ledger *ledger) noexcept nogil
# A place for one more connection; False: there is none, which is counted. `ledger` may be NULL, here and below.
cdef bint take_place(Ledger *ledger) noexcept nogil
cdef void give_place(Ledger *ledger) noexcept nogil
# Whether take_place would find one; counts a refusal where it would not.
cdef bint has_place(Ledger *ledger) noexcept nogil


cdef extern from * nogil:
    """
    static inline int64_t aiorch_add_count(int64_t *at, int64_t by) { return __atomic_add_fetch(at, by, __ATOMIC_RELAXED); }
    static inline int64_t aiorch_load_count(const int64_t *at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
    """
    int64_t aiorch_add_count(int64_t *at, int64_t by)
    int64_t aiorch_load_count(const int64_t *at)


cdef class ServerLedger:
    cdef Ledger *ledger
