# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Plays the door's part for the micro benchmark: puts requests into the queues and takes answers back, in C."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from aiorch_server._core.buffers cimport drop_buffer, new_buffer
from aiorch_server._core.request cimport (
    CompletionSink,
    Request,
    drain_sink,
    free_request,
    new_sink,
    now_ns,
    release_sink,
)
from aiorch_server._core.routes cimport DISPATCHED, RouteReader, Router, begin_round, dispatch, end_round
from aiorch_server._core.shares cimport RouteMark
from aiorch_server._core.wire_request cimport SCAN_OK, InferScan, scan_request


def time_scan(bytes message not None, long repeats):
    """Nanoseconds for ``repeats`` scans of a ModelInferRequest; ValueError when it is not one."""
    cdef const uint8_t *data = <const uint8_t *> <const char *> message
    cdef size_t size = len(message)
    cdef InferScan scan
    cdef long number, good = 0
    cdef int64_t started
    with nogil:
        started = now_ns()
        for number in range(repeats):
            good += scan_request(data, size, &scan) == SCAN_OK
        started = now_ns() - started
    if good != repeats:
        raise ValueError("not a well-formed ModelInferRequest")
    return started


cdef class Probe:
    """One door: a router to dispatch into and a sink that answers come back to."""

    cdef Router router
    cdef RouteReader reader
    cdef CompletionSink *sink

    def __cinit__(self, Router router not None):
        self.router = router
        self.sink = new_sink()
        if self.sink == NULL:
            raise MemoryError("no memory or no descriptor for a sink")

    def __dealloc__(self):
        if self.sink != NULL:
            release_sink(self.sink)

    def dispatch(self, bytes message not None, int count):
        """Dispatches ``count`` copies of the message; nanoseconds without the copying. ValueError if declined."""
        cdef size_t size = len(message)
        cdef const char *data = message
        cdef uint8_t **copies = <uint8_t **> malloc(<size_t> count * sizeof(uint8_t *))
        cdef Request *request
        cdef RouteMark mark
        cdef int64_t started
        cdef int number, dispatched = 0
        memset(&mark, 0, sizeof(RouteMark))
        if copies == NULL:
            raise MemoryError
        with nogil:
            for number in range(count):
                copies[number] = new_buffer(size, 0)
                if copies[number] != NULL:
                    memcpy(copies[number], data, size)
            started = now_ns()
            begin_round(self.router.state, &self.reader)
            for number in range(count):
                if copies[number] == NULL or dispatch(
                        &self.reader, copies[number], size, NULL, started, 0, NULL, &mark, NULL, self.sink, NULL,
                        &request) != DISPATCHED:
                    break
                dispatched += 1
            end_round(&self.reader)
            started = now_ns() - started
            for number in range(dispatched, count):
                drop_buffer(copies[number])
        free(copies)
        if dispatched != count:
            raise ValueError("the router declined the message")
        return started

    def drain(self):
        """Takes back and frees what was settled: (answered OK, failed, nanoseconds)."""
        cdef Request *request
        cdef Request *following
        cdef int answered = 0, failed = 0
        cdef int64_t started
        with nogil:
            started = now_ns()
            request = drain_sink(self.sink)
            while request != NULL:
                following = request.next
                if request.status:
                    failed += 1
                else:
                    answered += 1
                free_request(request)
                request = following
            started = now_ns() - started
        return answered, failed, started
