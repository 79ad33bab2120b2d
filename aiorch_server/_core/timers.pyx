"""Deadlines of one driver thread as a binary heap; see timers.pxd for the contract."""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, realloc


cdef inline void _place(TimerHeap *heap, Py_ssize_t place, Timer *timer) noexcept nogil:
    heap.items[place - 1] = timer
    timer.place = place


cdef void _rise(TimerHeap *heap, Timer *timer, Py_ssize_t place) noexcept nogil:
    cdef Timer *parent
    while place > 1:
        parent = heap.items[place // 2 - 1]
        if parent.due_ns <= timer.due_ns:
            break
        _place(heap, place, parent)
        place //= 2
    _place(heap, place, timer)


cdef void _sink(TimerHeap *heap, Timer *timer, Py_ssize_t place) noexcept nogil:
    cdef Py_ssize_t child
    while 2 * place <= heap.count:
        child = 2 * place
        if child < heap.count and heap.items[child].due_ns < heap.items[child - 1].due_ns:
            child += 1
        if timer.due_ns <= heap.items[child - 1].due_ns:
            break
        _place(heap, place, heap.items[child - 1])
        place = child
    _place(heap, place, timer)


cdef int set_timer(TimerHeap *heap, Timer *timer, int64_t due_ns, void *subject) noexcept nogil:
    cdef Py_ssize_t capacity
    cdef Timer **items
    if heap.count == heap.capacity:
        capacity = 2 * heap.capacity if heap.capacity else 64
        items = <Timer **> realloc(heap.items, capacity * sizeof(Timer *))
        if items == NULL:
            return -1
        heap.items, heap.capacity = items, capacity
    timer.due_ns, timer.subject = due_ns, subject
    heap.count += 1
    _rise(heap, timer, heap.count)
    return 0


cdef void clear_timer(TimerHeap *heap, Timer *timer) noexcept nogil:
    cdef Py_ssize_t place = timer.place
    cdef Timer *last
    if place == 0:
        return
    timer.place = 0
    last = heap.items[heap.count - 1]
    heap.count -= 1
    if last == timer:
        return
    if place > 1 and heap.items[place // 2 - 1].due_ns > last.due_ns:
        _rise(heap, last, place)
    else:
        _sink(heap, last, place)


cdef void *take_due(TimerHeap *heap, int64_t now_ns) noexcept nogil:
    cdef Timer *first
    if heap.count == 0:
        return NULL
    first = heap.items[0]
    if first.due_ns > now_ns:
        return NULL
    clear_timer(heap, first)
    return first.subject


cdef int64_t next_due(TimerHeap *heap) noexcept nogil:
    return heap.items[0].due_ns if heap.count else 0


cdef void free_timers(TimerHeap *heap) noexcept nogil:
    free(heap.items)
    heap.items, heap.count, heap.capacity = NULL, 0, 0


cdef class TimerProbe:
    """The heap as tests see it: numbered timers in one array of fixed size."""

    cdef TimerHeap heap
    cdef Timer *timers
    cdef Py_ssize_t size

    def __cinit__(self, Py_ssize_t size):
        self.timers = <Timer *> calloc(size, sizeof(Timer))
        if self.timers == NULL:
            raise MemoryError
        self.size = size

    def __dealloc__(self):
        free_timers(&self.heap)
        free(self.timers)

    def set(self, Py_ssize_t number, int64_t due_ns):
        """Sets timer ``number``; IndexError if there is none, ValueError if it is set already."""
        if not 0 <= number < self.size:
            raise IndexError(number)
        if self.timers[number].place:
            raise ValueError(f"timer {number} is set already")
        if set_timer(&self.heap, &self.timers[number], due_ns, &self.timers[number]) < 0:
            raise MemoryError

    def clear(self, Py_ssize_t number):
        """Clears timer ``number``; IndexError if there is none."""
        if not 0 <= number < self.size:
            raise IndexError(number)
        clear_timer(&self.heap, &self.timers[number])

    def take_due(self, int64_t now_ns):
        """The number of the earliest timer that is due, or None."""
        cdef void *subject = take_due(&self.heap, now_ns)
        return None if subject == NULL else <Timer *> subject - self.timers

    def next_due(self):
        """The earliest due time, 0 for none."""
        return next_due(&self.heap)
