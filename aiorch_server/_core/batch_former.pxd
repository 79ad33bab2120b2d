# Forms the next batch: "given now and a free instance: this batch, or look again at that time".
#
# Contract: pure; the caller holds the queue's lock. Rows count, not requests. Members of a batch have one shape; a batch
# of one shape never waits for, nor is flushed by, another shape. Members leave in order of urgency and a request that
# does not fit any more closes the batch, so that nothing is overtaken by what came later and is smaller.

from libc.stdint cimport int64_t

from aiorch_server._core.queue cimport Bucket, Queue
from aiorch_server._core.request cimport Request

cdef enum:
    MAX_PREFERRED = 16


cdef struct BatchPolicy:
    int64_t max_rows        # 1 for a model without batch dimension
    int64_t delay_ns        # how long the oldest member may wait for company
    int64_t run_ns          # expected time of a run: a batch starts so early that its first deadline can be kept
    int n_preferred
    int64_t preferred[MAX_PREFERRED]    # ascending row counts that are worth starting at once


cdef struct FormedBatch:
    Request *first          # chain linked by `next`, in order of urgency; NULL: nothing is due
    int members
    int64_t rows
    int64_t wake_ns         # when nothing is due: when to look again; 0: not before something arrives


cdef void form_batch(Queue *queue, const BatchPolicy *policy, int64_t now_ns, FormedBatch *batch) noexcept nogil


cdef class BatchFormer:
    # Owned: every request in `_waiting`, by ticket number in Request.owner.
    cdef Queue _queue
    cdef BatchPolicy _policy
    cdef dict _waiting      # ticket -> address of its Request
    cdef Py_ssize_t _next_ticket

    cdef list drop_chain(self, Request *chain)
