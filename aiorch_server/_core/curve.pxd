# How long an instance is busy with a batch of so many rows, as it was measured: the policy's knowledge of the model.
#
# Contract: pure; plain memory that is copied as a whole. No curve (`n` 0) means that nothing is known.

from libc.stdint cimport int64_t

cdef enum:
    MAX_POINTS = 33         # the powers of two of all batch sizes, and as many between them

# Bounds of a point: sums and products of them are numbers of 63 bits.
cdef extern from * nogil:
    """
    #define AIORCH_MAX_ROWS ((int64_t) 1 << 20)
    #define AIORCH_MAX_RUN_NS ((int64_t) 1 << 42)
    """
    const int64_t MAX_ROWS "AIORCH_MAX_ROWS"
    const int64_t MAX_RUN_NS "AIORCH_MAX_RUN_NS"


cdef struct Curve:
    int n
    int64_t rows[MAX_POINTS]        # ascending, 1..MAX_ROWS
    int64_t run_ns[MAX_POINTS]      # never descending: taken -> all answered


# Linear between points, beyond the last by the last slope; below the first as the first says, for a run costs something
# however small it is. 0: nothing is known. `rows` is at most MAX_ROWS.
cdef inline int64_t run_time(const Curve *curve, int64_t rows) noexcept nogil:
    cdef int at = 1
    if curve.n == 0:
        return 0
    if rows <= curve.rows[0] or curve.n == 1:
        return curve.run_ns[0]
    while at < curve.n - 1 and curve.rows[at] < rows:
        at += 1
    return curve.run_ns[at - 1] + (curve.run_ns[at] - curve.run_ns[at - 1]) * (rows - curve.rows[at - 1]) // (
        curve.rows[at] - curve.rows[at - 1])

# The largest batch of at most `most` rows that takes no longer than `ns`; 0: not even one row does. With a curve.
cdef int64_t rows_within(const Curve *curve, int64_t ns, int64_t most) noexcept nogil

# From pairs (rows, ns). ValueError: nothing was written.
cdef object read_curve(Curve *curve, points)
cdef tuple describe_curve(const Curve *curve)
