# A ModelInferResponse, written into memory that the caller has made large enough.
#
# Contract: pure functions on memory; no Python, no clock, no allocation.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.wire cimport MAX_DIMS, Slice


# `head` holds the encoded name and datatype fields of one output, which never change for a model.
cdef struct OutputView:
    Slice head
    int n_dims
    int64_t dims[MAX_DIMS]
    Slice data
    bint is_lent            # its bytes are not written but left out, before the byte `gap_at` of what is written
    size_t gap_at


# Size of a ModelInferResponse with what is lent; `head` holds the encoded model_name and model_version fields.
cdef size_t response_size(const Slice *head, const Slice *id, const OutputView *outputs, int n) noexcept nogil
# Where in a response of which nothing is lent the bytes of its largest output begin.
cdef size_t find_output(const Slice *head, const Slice *id, const OutputView *outputs, int n) noexcept nogil
# Writes exactly response_size(...) bytes at `out`, less those that are lent; sets each gap_at.
cdef void write_response(uint8_t *out, const Slice *head, const Slice *id, OutputView *outputs,
                         int n) noexcept nogil
