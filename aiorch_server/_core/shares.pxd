# The shares of a model's versions: which of them a request gets that names none, and whether it is in the sample.
#
# Requests without a key are numbered; multiples of an irrational number modulo 1 say where each falls. However many are
# looked at in a row, each version has its part of them to within two or three, whatever the pattern in which clients take
# turns, and the sample has its part of every version's. Requests with a key, where shares are sticky, go by rendezvous:
# each version draws a number from the key, weighted by its share, and the best one wins. So a share that grows takes keys
# and gives none away.
#
# Ownership: counted references; the Shares object and each route table that names it hold one. Any thread chooses: what
# is written after the making are the two counters, by atomic additions.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t


cdef enum:
    MAX_SHARES = 16
    WHOLE_SHARE = 10000     # all requests, as `routing.traffic` counts


# What was chosen for one request. It is chosen once: who cannot carry the request hands it on with this.
cdef struct Choice:
    int64_t version         # 0: not yet
    bint is_sampled


# What a request brings to the choice, and what was chosen; zeroed is "no key, nothing chosen".
cdef struct RouteMark:
    uint64_t key            # see hash_key
    bint has_key
    Choice choice


cdef struct Share:
    int64_t version
    uint64_t bound          # points below it, and not below that of the share before, are this one's
    double weight


cdef struct ShareTable:
    int references
    bint is_sticky
    bint is_sampled         # else `sample_bound` does not count
    uint64_t sample_bound
    int n_shares            # at least 1; none is empty
    Share shares[MAX_SHARES]
    uint8_t apart[64]       # from what every thread reads
    uint64_t turns          # requests without a key, and all where shares are not sticky
    uint64_t keyed_turns    # the others


cdef void retain_shares(ShareTable *table) noexcept nogil
cdef void release_shares(ShareTable *table) noexcept nogil
# The choice for the next request; `mark` says its key. Fills `mark.choice`.
cdef void choose_share(ShareTable *table, RouteMark *mark) noexcept nogil
# The key that a request's metadata name; an empty text is no key, and the caller's to sort out.
cdef uint64_t hash_key(const uint8_t *text, size_t size) noexcept nogil


cdef class Shares:
    cdef ShareTable *table
