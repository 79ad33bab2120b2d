# The published route table: model name and version -> scheduler. Rooms 2 and 3 of the compiled path.
#
# A door calls `dispatch` with a complete ModelInferRequest. What the compiled path can carry is enqueued; everything
# else is declined without a word: the Python plane then does the same request again and finds the words.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.request cimport CompletionSink, Request
from aiorch_server._core.wire cimport Slice


cdef enum DispatchResult:
    DISPATCHED = 0          # the request owns `message` now and comes back through `sink` or cancel_request
    DECLINED = 1            # nothing happened; `message` is still the caller's


cdef struct RouteTable      # immutable once published


cdef class Router:
    cdef RouteTable *table
    cdef object _targets    # keeps the published schedulers alive

    # `deadline_ns` is absolute on CLOCK_MONOTONIC, 0 for none. On DISPATCHED `*request` is the new request, whose
    # `owner` is as given. Instances are not woken until wake_instances: call that once per round of reads.
    cdef DispatchResult dispatch(self, uint8_t *message, size_t size, int64_t received_ns, int64_t deadline_ns,
                                 CompletionSink *sink, void *owner, Request **request) noexcept nogil
    cdef void wake_instances(self) noexcept nogil


# True: the request was still queued, has left the queue and is the caller's again (free it with free_request).
# False: it is running or settled; it will come through its sink, and the caller may set `owner` to NULL meanwhile
# (owner is only read and written by the sink's thread).
cdef bint cancel_request(Request *request) noexcept nogil
