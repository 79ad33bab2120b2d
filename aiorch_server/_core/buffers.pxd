# Memory for messages and tensors: counted, aligned where the tensor lies, and reused when it is big.
#
# A buffer is its data; the record in front of it is not seen outside. References are counted, any thread may give one
# back, none needs the interpreter lock: so bytes can be received into a buffer, read by a model and sent from it while
# each of the three holds its own reference.
#
# Big buffers go back to a pool that all threads share (one short lock): a fresh megabyte costs 256 page faults, which
# is more than copying it. What waits in the pool is bounded by POOL_BYTES. Under AddressSanitizer nothing is pooled,
# so that it sees each use after the end.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t


cdef enum:
    ALIGNMENT_BYTES = 64            # a cache line, and the widest vector registers
    POOLED_FROM_BYTES = 65536
    POOLED_TO_BYTES = 16777216
    POOL_BYTES = 67108864           # what may wait for reuse, in all
    MAX_SLAB_BYTES = 67108864       # what buffers of new_slab_buffer may hold, in all


# `size` bytes, not cleared, with one reference; the byte at `align_at` lies at a multiple of ALIGNMENT_BYTES, but
# in small buffers. NULL: no memory.
cdef uint8_t *new_buffer(size_t size, size_t align_at) noexcept nogil
# The same, aligned at its start, for tensors of several requests (see slabs.pxd). NULL also where MAX_SLAB_BYTES are in use.
cdef uint8_t *new_slab_buffer(size_t size) noexcept nogil
# One more reference.
cdef void hold_buffer(uint8_t *buffer) noexcept nogil
# Gives one reference back (NULL: nothing happens); the last one frees.
cdef void drop_buffer(uint8_t *buffer) noexcept nogil
# References at this moment: 1 is the caller's own, and nobody else can get one.
cdef int count_references(uint8_t *buffer) noexcept nogil
# Moves the caller's reference to a buffer of `size` bytes that begins with the first `kept` of the old one, which may be
# NULL; `align_at` as above, as far as that is cheap. NULL: no memory, nothing has changed.
cdef uint8_t *grow_buffer(uint8_t *buffer, size_t kept, size_t size, size_t align_at) noexcept nogil

# Bytes that wait in the pool.
cdef size_t count_pooled() noexcept nogil


# Where the end of a message lies, if not behind its beginning.
cdef struct Place:
    uint8_t *buffer                 # one reference; NULL: the message is in one piece
    uint8_t *data                   # within the buffer
    size_t at                       # the first byte of the message that lies there


# Bytes in a buffer as Python sees them, through the buffer protocol; owns one reference.
cdef class HeldBuffer:
    cdef uint8_t *buffer
    cdef uint8_t *data
    cdef size_t size

# `size` bytes at `data` within the buffer; takes a reference of its own.
cdef HeldBuffer hold_for_python(uint8_t *buffer, uint8_t *data, size_t size)


# Where the server itself copies bytes of messages; see docs/architecture.md.
cdef enum CopyPlace:
    COPY_RECEIVED = 0               # from the read buffer into a message
    COPY_GATHERED = 1               # from messages into a batch
    COPY_ENCODED = 2                # from outputs into answers
    COPY_SENT = 3                   # from answers into the write buffer, or aside while the socket is full
    N_COPY_PLACES = 4

# Any thread; `read_copied_bytes` shows the sums of the process.
cdef void count_copied(CopyPlace place, size_t size) noexcept nogil
