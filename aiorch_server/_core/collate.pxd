# A batch in an instance's hands: gather the members' tensors, scatter the outputs, settle each member on its own.

from libc.stdint cimport int64_t

from aiorch_server._core.request cimport Request
from aiorch_server._core.scheduler cimport Scheduler
from aiorch_server._core.scheduler_state cimport Run, SchedulerState
from aiorch_server._core.wire cimport Slice


cdef class Batch:
    # Owned: `_members` between take and settle. Each entry is a RUNNING request, or NULL once it was answered or failed.
    cdef Scheduler _scheduler
    cdef SchedulerState *_state     # holds one reference
    cdef Run _run
    cdef Request **_members         # room for so many of them: max_rows once it may be filled
    cdef int64_t _room
    cdef int _n
    cdef int _first, _last          # the selected members: [first, last)
    cdef int64_t _rows              # of the selected members
    cdef int _taken                 # members and rows as the batch was taken, for the stamps
    cdef int64_t _taken_rows
    cdef int64_t _free_since_ns, _gather_ns, _run_ns    # doorways: began to wait, began to gather, began to run
    cdef list _staging
    cdef Slice _extra               # encoded fields that each answer ends with; memory of whoever sets it
    cdef bint _is_detached          # one request taken out of a batch, whose run is counted there: see member.pxd

    # Called before it is filled or given a member. MemoryError: it holds what it held.
    cdef int make_room(self, int64_t members) except -1
    cdef bint pull(self) noexcept nogil
    cdef void sort_members(self) noexcept nogil     # only where rows of a slab may be viewed; else in order of urgency
    cdef int64_t count_rows(self) noexcept nogil
    cdef bint has_members(self) noexcept nogil
    cdef object check_outputs(self, outputs, bint is_ours)
    cdef object fail_rest(self)
    cdef object make_ready(self)
    cdef void stamp(self, Request *request, int64_t run_ended_ns, int64_t now) noexcept nogil
    cdef void observe(self, const Request *request, int64_t n, bint is_success, int64_t now) noexcept nogil
    cdef void deliver(self, bint is_success, int64_t run_ended_ns) noexcept nogil
