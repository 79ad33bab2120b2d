# The published route table: model name and version -> scheduler. Rooms 2 and 3 of the compiled path.
#
# A door calls `dispatch` with a complete ModelInferRequest. What the compiled path can carry is enqueued; everything
# else is declined without a word: the Python plane then does the same request again and finds the words.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t

from aiorch_server._core.request cimport CompletionSink, Request
from aiorch_server._core.scheduler cimport SchedulerState, cancel_request  # noqa: re-exported for doors
from aiorch_server._core.wire cimport Slice


cdef enum DispatchResult:
    DISPATCHED = 0          # the request owns `message` now and comes back through `sink` or cancel_request
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


cdef struct RouteTable:         # immutable once published
    int mask                    # number of slots - 1, a power of two - 1
    ModelRoute *slots           # open addressing; name.data NULL: free


cdef class Router:
    cdef RouteTable *table      # NULL: nothing is published
    cdef SchedulerState *touched    # got something since wake_instances; holds references

    # `deadline_ns` is absolute on CLOCK_MONOTONIC, 0 for none. On DISPATCHED `*request` is the new request, whose
    # `owner` is as given. Instances are not woken until wake_instances: call that once per round of reads.
    cdef DispatchResult dispatch(self, uint8_t *message, size_t size, int64_t received_ns, int64_t deadline_ns,
                                 CompletionSink *sink, void *owner, Request **request) noexcept nogil
    cdef void wake_instances(self) noexcept nogil
