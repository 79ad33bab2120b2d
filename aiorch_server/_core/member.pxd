# One request that was taken out of its batch: settled on its own, later, by any thread.
#
# Ownership: `detach` moves each request from the batch into a Member of its own, which owns it until it is settled. A Member
# that is dropped unsettled fails its request, so nobody waits for ever. Whoever settles it first wins, under the interpreter
# lock (`claim`); from then on nobody looks at the request any more, because its owner may free it at any time.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.collate cimport Batch
from aiorch_server._core.loans cimport Loan
from aiorch_server._core.request cimport Request
from aiorch_server._core.wire cimport OutputView


cdef class Member(Batch):
    cdef readonly object attachment     # what came with the request from Python; None if it came over the compiled path
    cdef readonly str id
    cdef readonly int64_t received_ns
    cdef bint _is_claimed
    cdef bint _was_cancelled            # when it was claimed
    cdef bytes _extra                   # fields of the answer besides its outputs, encoded
    cdef const uint8_t *_extra_data
    cdef size_t _extra_size

    cdef object claim(self)
