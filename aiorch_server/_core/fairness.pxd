# Who makes way for whom where not everybody can be served: the newest of the tenant that holds more than its share.
#
# Contract: pure, over a queue whose lock the caller holds. Nothing is taken out unless the newcomer can come in for it.
# What is taken out is the caller's: to be refused, with its retry_after_ns set.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t

from aiorch_server._core.batch_former cimport BatchPolicy
from aiorch_server._core.forecast cimport Forecast
from aiorch_server._core.queue cimport Queue
from aiorch_server._core.request cimport Request

cdef enum:
    MAX_DISPLACED = 8       # that make way for one newcomer, which may have more rows than they


# For a request of a tenant, with its level and times set, that would be late by `forecast`: takes out who has to make way
# so that it is not; a chain linked by `next`, and the forecast is the new one. `free_ns` and `n` as for foretell.
# NULL: it stays late, and nothing happened.
cdef Request *make_time(Queue *queue, const BatchPolicy *policy, Request *request, const int64_t *free_ns, int n,
                        int64_t now_ns, Forecast *forecast) noexcept nogil
# For a request of a tenant that finds no place: takes out the one that makes way. With `is_same_level` it is the level
# that is full; at least `n_bytes` of message are to become free. NULL: nobody does, and nothing happened.
cdef Request *make_room(Queue *queue, const BatchPolicy *policy, const Request *request, bint is_same_level,
                        int64_t n_bytes) noexcept nogil
