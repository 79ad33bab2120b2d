# Forms the next batch: "given now and a free instance: this batch, or look again at that time".
#
# Contract: pure; the caller holds the queue's lock. Rows count, not requests. Members of a batch have one shape; a batch
# of one shape never waits for, nor is flushed by, another shape. Members leave in order of urgency and a request that
# does not fit any more closes the batch, so that nothing is overtaken by what came later and is smaller.
# Levels are strict but for this: of 16 batches one is for who has waited for PATIENCE_NS, in the order of arrival.
#
# A batch starts when it is full, when its oldest member has waited for `delay_ns`, or when its first end could not be kept
# otherwise. Where the policy sheds, it is no larger than its first end allows.

from libc.stdint cimport int64_t

from aiorch_server._core.curve cimport Curve, run_time
from aiorch_server._core.queue cimport Bucket, Queue
from aiorch_server._core.request cimport Request

cdef enum:
    MAX_PREFERRED = 16
    MAX_INSTANCES = 65536
    STARVED_EVERY = 16


cdef struct BatchPolicy:
    int64_t max_rows        # the cap of now, at most the model's; a larger request still runs, alone
    int64_t delay_ns        # how long the oldest member may wait for company
    int64_t target_ns       # what each request's latency should be, from received_ns on; 0: nothing is asked for
    int64_t margin_ns       # kept free before each end: for what the curve does not know
    int64_t run_ns          # a slow average of runs: what is expected of the next where there is no curve
    int instances           # that serve this queue; 0: not told
    bint is_deferring       # waits no longer than until the latest start that keeps the target, too
    bint is_shedding        # refuses, and drops, what cannot keep its end; needs a curve
    int n_preferred
    int64_t preferred[MAX_PREFERRED]    # ascending row counts that are worth starting at once
    Curve curve


cdef struct FormedBatch:
    Request *first          # chain linked by `next`, in order of urgency; NULL: nothing is due
    int members
    int64_t rows
    int64_t wake_ns         # when nothing is due: when to look again; 0: not before something arrives


cdef void form_batch(Queue *queue, const BatchPolicy *policy, int64_t now_ns, FormedBatch *batch) noexcept nogil

# How long a batch of so many rows is expected to run.
cdef inline int64_t expected_run(const BatchPolicy *policy, int64_t rows) noexcept nogil:
    return run_time(&policy.curve, rows) if policy.curve.n else policy.run_ns

# What a request's end_ns must be when it enters the queue.
cdef inline int64_t find_end(const BatchPolicy *policy, const Request *request) noexcept nogil:
    cdef int64_t end_ns = request.received_ns + policy.target_ns if policy.target_ns else 0
    return request.deadline_ns if request.deadline_ns and (not end_ns or request.deadline_ns < end_ns) else end_ns

# Overwrites what is not None of the policy, with the units of the names; ValueError: nothing was changed.
cdef object change_policy(BatchPolicy *policy, int64_t largest_rows, max_rows, delay_ns, target_ns, margin_ns,
                          is_deferring, is_shedding, instances, curve)


cdef class BatchFormer:
    # Owned: every request in `_waiting`, by ticket number in Request.owner.
    cdef Queue _queue
    cdef BatchPolicy _policy
    cdef int64_t _largest_rows
    cdef dict _waiting      # ticket -> address of its Request
    cdef Py_ssize_t _next_ticket

    cdef Request *make_request(self, int64_t now_ns, rows, shape, level, deadline_ns, expires_ns, received_ns) except NULL
    cdef list drop_chain(self, Request *chain)
