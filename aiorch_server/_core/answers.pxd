# What goes back from a batch: each member's answer, written from its rows of the outputs or lent where they lie.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.loans cimport Loan
from aiorch_server._core.request cimport Request
from aiorch_server._core.spec cimport SpecState
from aiorch_server._core.wire cimport Slice
from aiorch_server._core.wire_response cimport OutputView


# Writes an answer with its 5-byte gRPC frame header, without what is lent, and with the encoded fields `extra` at its
# end, into `request`; -1 when memory ran out.
cdef int encode_answer(const SpecState *spec, Request *request, OutputView *views, Loan **loans, int n,
                       Slice extra) noexcept nogil

# With the interpreter lock: the memory that goes with an array, of which it may be a part; 0: another array, model or
# framework has it too.
cdef size_t count_own_bytes(array)


cdef class Encoder:
    # The batch's, which outlives the encoding: of `members` those selected, [first, last), some of them NULL.
    cdef const SpecState *spec
    cdef Request **members
    cdef int first, last
    cdef int64_t rows
    cdef Slice extra                # encoded fields that each answer ends with
    # Owned.
    cdef Py_buffer *buffers
    cdef OutputView *views          # dims with the whole batch in front; data is the start of the output
    cdef size_t *row_bytes
    cdef bint *is_held
    cdef Slice **parts              # per output: NULL, or for BYTES the encoded elements of each selected member
    cdef Loan **loans               # per output: NULL, or answers may send it from where it lies
    cdef list kept                  # the bytes objects behind the parts
    cdef int n

    cdef object add(self, int index, tensor, given, size_t own_bytes)
    cdef object encode_bytes(self, int index, array, bint is_batched)
    cdef void encode(self) noexcept nogil
