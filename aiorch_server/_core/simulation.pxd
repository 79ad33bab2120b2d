# A scheduler, its instances and the machine under them, without time: what would become of these requests?
#
# The queue, the batches, who is refused and who is dropped are decided by the very functions of the server (queue,
# batch_former, forecast); only what surrounds them is imitated here:
#   door      one thread reads requests, one after the other, for `door_ns` each, and writes answers, for `answer_ns` each
#   sleep     an idle instance looks into the queue `wake_ns` after it was called
#   run       the truth's time for the rows, times a lognormal factor of the truth's spread at that size
#   stall     after so much time of running, whoever runs is held up for a while: by others on the machine
#   cores     where as many instances run as there are cores, or more, the door's work holds them up
#   slowdown  how many times slower a run is while so many instances run, compared with one alone
# Order: time, and at one time what ends before what comes.
#
# A simulation may be advanced piece by piece, and its policy changed between pieces, as a tuner does it: pieces change
# nothing in what happens.
#
# Contract: pure and deterministic; noise is given. Memory: what waits and runs, bounded by `max_waiting`.

from libc.stdint cimport int64_t

from aiorch_server._core.batch_former cimport BatchPolicy
from aiorch_server._core.curve cimport MAX_POINTS, Curve
from aiorch_server._core.queue cimport Queue
from aiorch_server._core.request cimport Request

cdef enum:
    MAX_SIMULATED = 64      # instances


cpdef enum Fate:            # of a request, where a latency would stand
    LATE_AT_DOOR = -1       # refused: an answer could not have been in time
    LATE_IN_QUEUE = -2      # dropped for the same reason after it had waited
    NO_ROOM = -3
    EXPIRED = -4            # its deadline, or its time in the queue, was over


cdef struct Machine:
    Curve truth
    double spreads[MAX_POINTS]      # sigma of the factor's logarithm, at the truth's points
    double slowdowns[MAX_SIMULATED + 1]
    double cores
    int64_t door_ns
    int64_t answer_ns
    int64_t wake_ns


# One instance. `first` is the chain of the requests that it runs, linked by `next`; owned.
cdef struct Runner:
    Request *first
    int64_t taken_ns
    int64_t end_ns
    int64_t rows
    Py_ssize_t batch


cdef struct World:
    Machine machine
    BatchPolicy policy
    Queue queue
    int64_t max_waiting
    int64_t expiry_ns               # 0: none
    Runner runners[MAX_SIMULATED]
    int places                      # runners that there can be
    int instances                   # that take batches; may be fewer than run, which then end one by one
    int running
    int64_t look_ns                 # when an idle instance looks into the queue; NEVER: not before something happens
    int64_t door_free_ns
    int64_t begun_ns                # when the door began to read the next request; NEVER: not settled
    int64_t now_ns                  # all until then has happened
    Request *spare                  # requests to be used again, linked by `next`; owned
    # what comes, and what became of whom; memory of the caller. Batches: at most as many as requests
    Py_ssize_t n
    Py_ssize_t next                 # who comes next
    const int64_t *arrivals_ns
    const int64_t *rows
    const int64_t *levels
    const int64_t *deadlines_ns
    const int64_t *shapes
    int64_t *latencies_ns
    int64_t *batch_of
    const double *noise             # standard normal values, used in turn by batches
    Py_ssize_t n_noise
    const int64_t *stall_gaps_ns    # time of running between stalls, and how long these are; used in turn
    const int64_t *stalls_ns
    Py_ssize_t n_stalls
    Py_ssize_t stall
    int64_t until_stall_ns
    Py_ssize_t n_batches
    int64_t *batch_starts_ns
    int64_t *batch_ends_ns
    int64_t *batch_rows
