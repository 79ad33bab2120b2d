# What is watched of one scheduler's requests: the slow ones are noted, a sample leaves the compiled path to be traced.
#
# With nothing to watch a request costs one comparison at the desk and one when it is settled. Notes are bounded: who takes
# them too seldom loses the latest, and is told how many. All functions may be called by any thread.

from libc.stdint cimport int64_t, uint8_t, uint64_t

from aiorch_server._core.request cimport Request, Stamps, TraceParent, pthread_mutex_t


cdef enum:
    MAX_NOTES = 64
    NOTED_ID_BYTES = 64


cdef struct Note:           # a copy: the request is gone when it is read
    char id[NOTED_ID_BYTES]
    int id_size
    TraceParent parent
    int status
    Stamps stamps


cdef struct Watch:
    int64_t slow_ns         # from this total time on a request is noted; INT64_MAX: none is
    bint is_traced          # else nothing below counts
    bint follows_parents
    int64_t every           # one request in so many that have no parent; 0: none
    int64_t seen            # of these, since the last that was chosen
    int64_t owed            # chosen at the desk, not yet traced by Python
    pthread_mutex_t lock    # guards the rest
    Note *notes             # owned; NULL until somebody watches
    int n_notes
    uint64_t n_lost


cdef void init_watch(Watch *watch) noexcept nogil
cdef void drop_watch(Watch *watch) noexcept nogil
# Whether a request with this parent (NULL: none) is to be traced, which the caller must leave to Python then.
cdef bint choose(Watch *watch, const TraceParent *parent) noexcept nogil
# Notes a request that took too long and ended with `status`; never waits.
cdef void note_slow(Watch *watch, const Request *request, const Stamps *stamps, int status) noexcept nogil

# For Python, with the interpreter lock.
cdef object watch_slow(Watch *watch, int64_t threshold_ns)
cdef object take_notes(Watch *watch)
cdef object set_sampling(Watch *watch, int64_t every, bint follows_parents, bint is_traced)
# Whether Python shall trace a request that has no parent: one that the desk chose, or the next in turn.
cdef bint take_sample(Watch *watch) noexcept nogil
cdef object describe_stamps(const Stamps *stamps, object target)
