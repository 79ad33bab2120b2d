"""Curves of run times over rows; see curve.pxd."""

from libc.string cimport memset


cdef int64_t rows_within(const Curve *curve, int64_t ns, int64_t most) noexcept nogil:
    cdef int64_t low = 0, high = most, middle
    if run_time(curve, most) <= ns:
        return most
    while high - low > 1:       # low rows are within, high rows are not
        middle = (low + high) // 2
        if run_time(curve, middle) <= ns:
            low = middle
        else:
            high = middle
    return low


cdef object read_curve(Curve *curve, points):
    cdef Curve new
    memset(&new, 0, sizeof(Curve))
    pairs = [(rows, ns) for rows, ns in points]
    if len(pairs) > MAX_POINTS:
        raise ValueError(f"a curve has at most {MAX_POINTS} points, not {len(pairs)}")
    for rows, ns in pairs:
        if not 1 <= rows <= MAX_ROWS or not 0 <= ns <= MAX_RUN_NS:
            raise ValueError(f"a point of a curve lies within 1..{MAX_ROWS} rows and 0..{MAX_RUN_NS} ns, not at {rows}, {ns}")
        if new.n and (rows <= new.rows[new.n - 1] or ns < new.run_ns[new.n - 1]):
            raise ValueError(f"points of a curve ascend, in time perhaps not; {rows} rows in {ns} ns came after "
                             f"{new.rows[new.n - 1]} in {new.run_ns[new.n - 1]} ns")
        new.rows[new.n], new.run_ns[new.n] = rows, ns
        new.n += 1
    curve[0] = new


cdef tuple describe_curve(const Curve *curve):
    return tuple([(curve.rows[i], curve.run_ns[i]) for i in range(curve.n)])
