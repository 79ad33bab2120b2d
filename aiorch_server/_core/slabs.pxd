# Row slabs: where the big tensors of requests are received that will probably run together, one row after the other.
#
# A slab is one counted buffer. Rows are given out in order and never twice; whoever has a row holds a reference to the
# whole: the stream that receives it, then its request, a batch that views it, an answer that is sent from it. A row that
# nobody fills or uses any more is a hole until all rows are let go of; then the slab begins anew, or its memory goes back
# to the pool. So nothing here ever waits for a client.
#
# Contract: pure memory; the scheduler's lock guards it, so what is let go of is given to the caller, who drops it outside:
# megabytes may go back to the system. A slab is as large as a batch usually was of late, and there is
# none where requests run alone. What all slabs hold, and with them the rows that a slow reader of answers keeps, is
# bounded by buffers.MAX_SLAB_BYTES; above it, messages have buffers of their own as ever.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.buffers cimport Place


cdef enum:
    USUAL_SCALE = 16


cdef struct Slab:                   # zero-initialised: empty
    uint8_t *buffer                 # one reference, or NULL
    size_t row_bytes
    int64_t n_rows
    int64_t n_given
    int64_t usual_rows              # of a batch, an average times USUAL_SCALE that rises faster than it falls
    bint is_batch_over              # one was taken since the last row was given


# Rows for a tensor of `rows` times `row_bytes`: sets buffer (one reference for the caller) and data of `place`.
# False: there are none. `dropped` is NULL, or a buffer for the caller to drop, in either case.
cdef bint reserve_rows(Slab *slab, size_t row_bytes, int64_t rows, Place *place, uint8_t **dropped) noexcept nogil
# A batch of that many rows was taken.
cdef void note_batch(Slab *slab, int64_t rows) noexcept nogil
# Memory that nobody has rows in, for the caller to drop; or NULL.
cdef uint8_t *relax_slab(Slab *slab) noexcept nogil
# The memory, whoever has rows in it, for the caller to drop; or NULL.
cdef uint8_t *empty_slab(Slab *slab) noexcept nogil
