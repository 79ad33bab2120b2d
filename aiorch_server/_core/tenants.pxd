# What waits in one queue by tenant, so that it is known who holds more of it than the share of his weight.
#
# What a tenant holds is the rows of its waiting requests by its weight. Requests without a tenant (number 0) stand in no
# line: nobody makes way for them, and they for nobody.
# Contract: pure memory; the scheduler's lock guards it. A line lives as long as one of its requests waits, so there are
# no more lines than requests. Joining and leaving are O(log lines), finding the heaviest is O(1).

from libc.stdint cimport int64_t, uint32_t, uint64_t

from aiorch_server._core.request cimport Request

cdef enum:
    N_SLOTS = 1024
    MAX_HEAVY = 31          # lines, about the heaviest, that find_rival looks at
    MAX_PASSED = 32         # requests of one line that are looked at for one that may make way


cdef struct Line:
    Line *next              # in the chain of its slot, or spare
    uint64_t tenant
    double weight           # as the latest request said
    int64_t rows
    Py_ssize_t n
    Py_ssize_t place        # in the heap
    Request *newest         # its requests by arrival, linked by line_older and line_newer


cdef struct Tenants:
    Line *slots[N_SLOTS]    # owned, as all lines
    Line **heap             # owned: the heaviest first
    Py_ssize_t n
    Py_ssize_t capacity
    Line *spare             # one line kept, so that a lone client does not allocate on each request


# Puts a request of a tenant into its line; `tenants` is made with the first. Out of memory: it stands in none.
cdef void join_line(Tenants **tenants, Request *request) noexcept nogil
# Takes a request out of the line that it stands in.
cdef void leave_line(Tenants *tenants, Request *request) noexcept nogil
# Frees all; every line must be empty. NULL is nothing to do.
cdef void drop_tenants(Tenants *tenants) noexcept nogil

# The line that holds most, has several requests, one of them fit to make way for `request`, and would hold more than that
# one's own line with it. The first request of a tenant that has none waiting needs no share. NULL: there is none.
cdef const Line *find_rival(const Tenants *tenants, const Request *request, bint is_same_level) noexcept nogil
# The newest of a line, from `request` on towards older ones, that may make way for another of that level: of the same
# level, or else of one that is no more urgent; none that was delayed, for it was promised to be served. NULL: none.
cdef Request *find_victim(Request *request, uint32_t level, bint is_same_level) noexcept nogil
# What the request's tenant would hold with it; 0 where it has nothing waiting.
cdef double holding_with(const Tenants *tenants, const Request *request) noexcept nogil
