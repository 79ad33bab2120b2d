# The published route table: model name and version -> scheduler. Rooms 2 and 3 of the compiled path.
#
# A door calls `dispatch` with a complete ModelInferRequest. What the compiled path can carry is enqueued; everything
# else is declined without a word: the Python plane then does the same request again and finds the words.
#
# Many threads read, the control plane publishes: a reader holds a counted reference to the table for one round (all that
# came with one wait for the network), so a retired table is freed by whoever leaves it last, with or without the
# interpreter lock. The lock here guards the exchange of a pointer and its count, never more.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t

from aiorch_server._core.buffers cimport Place
from aiorch_server._core.passes cimport Claim
from aiorch_server._core.request cimport CompletionSink, Request, TraceParent, pthread_mutex_t
from aiorch_server._core.scheduler_state cimport SchedulerState
from aiorch_server._core.shares cimport RouteMark, ShareTable
from aiorch_server._core.wire cimport Slice


cdef enum DispatchResult:
    DISPATCHED = 0          # the request owns `message` and `rest` now and comes back through `sink` or cancel_request
    DECLINED = 1            # nothing happened; `message` is still the caller's


cdef struct VersionRoute:
    int64_t version
    SchedulerState *scheduler   # holds one reference


cdef struct ModelRoute:
    Slice name                  # owned
    uint64_t hash
    int default_index           # into versions; -1: no version is served by default
    int n_versions
    VersionRoute *versions      # owned, ascending
    ShareTable *shares          # one reference; NULL: who names no version gets the default


cdef enum:
    MAX_TOUCHED = 32


cdef struct RouteTable:         # immutable once published
    int references              # the router's, and those of the readers in a round
    int mask                    # number of slots - 1, a power of two - 1
    ModelRoute *slots           # open addressing; name.data NULL: free


cdef struct RouterState:        # counted references: the Router object and each driver hold one
    pthread_mutex_t lock
    RouteTable *table           # guarded by lock; NULL: nothing is published
    int references


# What one thread has in its hands during a round; zero-initialised is "no round".
cdef struct RouteReader:
    RouteTable *table           # holds one reference; NULL: nothing is published, or no round
    SchedulerState *touched[MAX_TOUCHED]    # got something in this round; holds references
    int n_touched


cdef void retain_router(RouterState *router) noexcept nogil
cdef void release_router(RouterState *router) noexcept nogil

# A round: begin_round, any number of dispatches, end_round, which wakes the instances of what was dispatched.
cdef void begin_round(RouterState *router, RouteReader *reader) noexcept nogil
cdef void end_round(RouteReader *reader) noexcept nogil
# `rest`: the message's end where that lies elsewhere, as place_tensor said; NULL, or without a buffer: it does not.
# `deadline_ns` is absolute on CLOCK_MONOTONIC, 0 for none; `parent` NULL is none. What shall be traced or is in the sample
# of its shares is declined. `mark` has the request's key; a version that was chosen for it is in there afterwards, also
# where it was declined, and holds if it is there before. `claim` NULL: nobody is asked who calls; else what has no pass is
# declined, and a pass's quota counts. On DISPATCHED `*request` is the new request, whose `owner` is as given.
cdef DispatchResult dispatch(RouteReader *reader, uint8_t *message, size_t size, const Place *rest,
                             int64_t received_ns, int64_t deadline_ns, const TraceParent *parent, RouteMark *mark,
                             const Claim *claim, CompletionSink *sink, void *owner, Request **request) noexcept nogil


# Where the tensor of a message belongs of which the head has come: into rows of a batch of the version that it names, or
# that is chosen for it, see `dispatch`. False: into the message. Any thread, in a round or not.
cdef bint place_tensor(RouterState *router, const uint8_t *head, size_t head_size, size_t message_size,
                       RouteMark *mark, Place *place) noexcept nogil


cdef class Router:
    cdef RouterState *state
