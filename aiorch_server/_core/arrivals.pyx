"""The order in which requests came; see arrivals.pxd."""


cdef void note_arrival(Arrivals *arrivals, Request *request) noexcept nogil:
    request.later = NULL
    request.sooner = arrivals.last
    if arrivals.last != NULL:
        arrivals.last.later = request
    else:
        arrivals.first = request
    arrivals.last = request


cdef void forget_arrival(Arrivals *arrivals, Request *request) noexcept nogil:
    if request.sooner != NULL:
        request.sooner.later = request.later
    else:
        arrivals.first = request.later
    if request.later != NULL:
        request.later.sooner = request.sooner
    else:
        arrivals.last = request.sooner
    request.sooner = request.later = NULL


cdef Request *take_settled(Arrivals *arrivals) noexcept nogil:
    cdef Request *first = NULL
    cdef Request *last = NULL
    cdef Request *request
    while arrivals.first != NULL and arrivals.first.is_settled:
        request = arrivals.first
        forget_arrival(arrivals, request)
        request.next = NULL
        if last == NULL:
            first = request
        else:
            last.next = request
        last = request
    return first
