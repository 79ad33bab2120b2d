# One request that was taken out of its batch: settled on its own, later, by any thread.
#
# Ownership: `detach` moves each request from the batch into a Member of its own, which owns it until it is settled. A Member
# that is dropped unsettled fails its request, so nobody waits for ever. Whoever settles it first wins, under the interpreter
# lock (`claim`); from then on nobody looks at the request any more, because its owner may free it at any time.

from libc.stdint cimport int64_t

from aiorch_server._core.collate cimport Batch


cdef class Member(Batch):
    cdef readonly object attachment     # what came with the request from Python; None if it came over the compiled path
    cdef readonly str id
    cdef readonly int64_t received_ns
    cdef bint _is_claimed
    cdef bint _was_cancelled            # when it was claimed
    cdef bytes _fields                  # what `_extra` points to

    cdef object claim(self)
