# The way from the queue to the instances, which pull; and the scheduler as Python has it.

from libc.stdint cimport int64_t

from aiorch_server._core.request cimport Request
from aiorch_server._core.scheduler_state cimport Run, SchedulerState
from aiorch_server._core.spec cimport ModelSpec


# Blocks until a batch is due and gives its members as a chain in order of urgency, RUNNING now; NULL once the scheduler
# is closed and empty, or the instance shall leave. `free_since` is set to when this instance began to wait; `run` is this
# instance's, zeroed at first, and listed while its batch runs: until the next call, or end_run.
cdef Request *take_batch(SchedulerState *state, Run *run, int *members, int64_t *rows, int64_t *free_since) noexcept nogil


cdef class Scheduler:
    cdef SchedulerState *state      # holds one reference
    cdef readonly ModelSpec spec

    cdef int64_t largest_rows(self)
