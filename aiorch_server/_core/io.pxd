# The asyncio side of an I/O thread: starts and ends it, and stands for its slow calls on the loop.
#
# Ownership: `state` belongs to the thread while it runs (the thread holds a reference to its IoThread), and to this
# object before and after. A LinkedCall holds a reference to its link; the link's `call` is borrowed, and NULL once the
# call is finished or over: `open_calls` keeps it alive until then.

from libc.stddef cimport size_t

from aiorch_server._core.call cimport Call
from aiorch_server._core.crossing cimport Command, CommandKind, Event, Link
from aiorch_server._core.io_state cimport IoState
from aiorch_server._core.routes cimport Router


cdef class IoThread:
    cdef object loop
    cdef object on_call             # callable(Call): starts a slow call
    cdef object on_settled          # bound method, while answers that come late are waited for
    cdef IoState *state
    cdef object thread
    cdef set open_calls
    cdef list idle_waiters          # futures of wait_disconnected
    cdef bint is_idle
    cdef bint is_closed

    cdef int order(self, CommandKind kind, int code, bytes text) except -1
    cdef int handle_event(self, Event *event) except -1
    cdef int handle_call_event(self, Event *event) except -1


cdef class LinkedCall(Call):
    cdef IoThread thread
    cdef Link *link                 # a reference; NULL until it is opened
    cdef bint is_open               # neither finished nor over
    cdef object inbox               # deque of (bytes, is_compressed)
    cdef size_t written_bytes

    cdef int open(self, IoThread thread, Link *link) except -1
    cdef Command *new_command(self, CommandKind kind) except NULL
    cdef int close(self) except -1
