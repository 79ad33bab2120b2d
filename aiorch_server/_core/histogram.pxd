# A log-linear histogram of nanoseconds: SUB_BUCKETS equal parts per power of two, exact counts, mergeable by addition.
# Relative width of a bucket: 1 / SUB_BUCKETS. After Dean and Barroso's and HdrHistogram's idea; fixed range, no allocation.

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    SUB_BITS = 4
    SUB_BUCKETS = 16
    TOP_BIT = 42            # values from 2**42 ns (73 minutes) on share the last bucket
    N_BUCKETS = 625         # (TOP_BIT - SUB_BITS + 1) * SUB_BUCKETS, and one for the rest


cdef struct HistogramState:
    uint64_t count
    uint64_t sum_ns
    uint64_t counts[N_BUCKETS]


cdef extern from * nogil:
    """
    static inline int aiorch_top_bit(uint64_t v) { return 63 - __builtin_clzll(v | 1); }
    """
    int aiorch_top_bit(uint64_t value)


cdef inline int bucket_of(int64_t value_ns) noexcept nogil:
    cdef uint64_t value = <uint64_t> value_ns if value_ns > 0 else 0
    cdef int top
    if value < SUB_BUCKETS:
        return <int> value
    top = aiorch_top_bit(value)
    if top >= TOP_BIT:
        return (TOP_BIT - SUB_BITS + 1) * SUB_BUCKETS
    return (top - SUB_BITS + 1) * SUB_BUCKETS + <int> ((value >> (top - SUB_BITS)) & (SUB_BUCKETS - 1))


cdef inline void record(HistogramState *histogram, int64_t value_ns) noexcept nogil:
    histogram.counts[bucket_of(value_ns)] += 1
    histogram.count += 1
    histogram.sum_ns += <uint64_t> value_ns if value_ns > 0 else 0


# Smallest value that falls into the bucket.
cdef uint64_t lower_bound(int bucket) noexcept nogil


cdef class Histogram:
    cdef HistogramState state

    @staticmethod
    cdef Histogram copy_of(const HistogramState *state)
