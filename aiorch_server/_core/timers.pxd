# Deadlines of one driver thread: a binary heap of timers that live inside the things they time.
#
# A Timer is embedded in its subject and never allocated here; the heap holds pointers only. A timer that is set must
# be cleared before its subject is freed. No locks: one thread owns a heap. Zero-initialised structs are ready to use.

from libc.stdint cimport int64_t


cdef struct Timer:
    int64_t due_ns          # CLOCK_MONOTONIC; 0: none
    Py_ssize_t place        # 1-based place in the heap; 0: not set
    void *subject


cdef struct TimerHeap:
    Timer **items
    Py_ssize_t count
    Py_ssize_t capacity


# Puts the timer into the heap; it must not be set already. -1 when memory ran out, the timer is then not set.
cdef int set_timer(TimerHeap *heap, Timer *timer, int64_t due_ns, void *subject) noexcept nogil
# Takes the timer out; nothing happens if it is not set. `due_ns` stays readable.
cdef void clear_timer(TimerHeap *heap, Timer *timer) noexcept nogil
# Takes out and gives the earliest subject that is due, or NULL.
cdef void *take_due(TimerHeap *heap, int64_t now_ns) noexcept nogil
# The earliest due time, or 0 when no timer is set.
cdef int64_t next_due(TimerHeap *heap) noexcept nogil
cdef void free_timers(TimerHeap *heap) noexcept nogil
