# Inputs of a batch as arrays for Python models: copied together, or the message itself where it holds them all.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.request cimport Request
from aiorch_server._core.spec cimport SpecState


cdef struct Selection:          # borrowed from the batch: of `members` those in [first, last) that are not NULL, one or more
    Request **members
    int first
    int last
    int64_t rows
    const SpecState *spec


cdef class Staging:
    # Memory of one input that is reused from batch to batch and grows to the largest.
    cdef object _memory         # uint8 array that owns the bytes
    cdef uint8_t *_data
    cdef size_t _capacity
    cdef object _view           # the last typed view, never given away, and what it was made for
    cdef tuple _view_shape

    cdef object shaped(self, tuple shape, object dtype, size_t size)


# The input at `index`, whose TensorSpec is `tensor`: rows of all members one after the other, in order. Small ones lie in
# `staging`, valid until its next use, others as long as they are held. MemoryError; RuntimeError for a ragged input of several.
cdef object gather_tensor(const Selection *selection, int index, object tensor, Staging staging)
