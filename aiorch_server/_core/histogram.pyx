"""The one histogram behind metrics, statistics and tuning."""

from libc.string cimport memcpy, memset


cdef uint64_t lower_bound(int bucket) noexcept nogil:
    cdef int octave
    if bucket < SUB_BUCKETS:
        return <uint64_t> bucket
    octave = bucket // SUB_BUCKETS
    return (<uint64_t> (SUB_BUCKETS + bucket % SUB_BUCKETS)) << (octave - 1)


cdef class Histogram:
    """Counts of durations in nanoseconds; not synchronised, so one writer at a time."""

    def __cinit__(self):
        memset(&self.state, 0, sizeof(self.state))

    @staticmethod
    cdef Histogram copy_of(const HistogramState *state):
        cdef Histogram histogram = Histogram.__new__(Histogram)
        memcpy(&histogram.state, state, sizeof(HistogramState))
        return histogram

    @property
    def count(self):
        """Number of recorded values."""
        return self.state.count

    @property
    def sum_ns(self):
        """Sum of recorded values, nanoseconds."""
        return self.state.sum_ns

    def record(self, int64_t value_ns):
        """Counts one duration; what is negative counts as 0."""
        record(&self.state, value_ns)

    def merge(self, Histogram other not None):
        """Adds the counts of another histogram to this one."""
        self.state.count += other.state.count
        self.state.sum_ns += other.state.sum_ns
        for i in range(N_BUCKETS):
            self.state.counts[i] += other.state.counts[i]

    def quantile(self, double q):
        """The smallest value, to a bucket's width, that at least ``q`` of the values do not exceed; 0 when empty.

        Gives the upper edge of the bucket, so that a stated percentile is never flattering. ``q`` is within 0..1.
        """
        cdef uint64_t seen = 0
        cdef double wanted
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"a quantile lies between 0 and 1, not at {q}")
        if self.state.count == 0:
            return 0
        wanted = q * <double> self.state.count
        for i in range(N_BUCKETS):
            seen += self.state.counts[i]
            if seen > 0 and <double> seen >= wanted:
                return lower_bound(i + 1) - 1
        return lower_bound(N_BUCKETS - 1)

    def count_below(self, uint64_t bound_ns):
        """Number of values below ``bound_ns``; exact where the bound is a bucket's edge, as powers of two are."""
        cdef uint64_t seen = 0
        for i in range(N_BUCKETS):
            if lower_bound(i) >= bound_ns:
                break
            seen += self.state.counts[i]
        return seen

    def buckets(self):
        """``[(lower_ns, count), ...]`` of the buckets that are not empty."""
        return [(lower_bound(i), self.state.counts[i]) for i in range(N_BUCKETS) if self.state.counts[i]]

    def bounds(self):
        """``{upper_ns: count}`` of the buckets that are not empty: that many values lie below each bound, and not below
        the bucket's lower one.
        """
        return {lower_bound(i + 1): self.state.counts[i] for i in range(N_BUCKETS) if self.state.counts[i]}
