# Requests of one scheduler in the order in which they came, where their answers must leave in that order.
#
# A request is listed from when it is queued until its answer may leave, or its caller has taken it back.
# Contract: pure memory; the scheduler's lock guards it.

from aiorch_server._core.request cimport Request


cdef struct Arrivals:               # zero-initialised: empty
    Request *first                  # queued, running or settled, by arrival
    Request *last
    bint is_handing_over            # a thread has taken answers off and gives them to their sinks: nobody else takes any


cdef void note_arrival(Arrivals *arrivals, Request *request) noexcept nogil
# Takes it off, wherever it stands.
cdef void forget_arrival(Arrivals *arrivals, Request *request) noexcept nogil
# Takes off the settled ones before which nothing is open: a chain linked by `next`, in their order; NULL: none.
cdef Request *take_settled(Arrivals *arrivals) noexcept nogil
