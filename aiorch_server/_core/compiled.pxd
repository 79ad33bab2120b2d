# Batches of compiled instances: pulled, gathered, run and answered by one thread that never takes the interpreter lock.

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint32_t


# The contract is in the header: other languages read it too.
cdef extern from "aiorch_instance.h" nogil:
    const char *AIORCH_INSTANCE_CAPSULE
    enum:
        AIORCH_INSTANCE_ABI
        AIORCH_MAX_DIMS
    ctypedef struct AiorchTensor:
        void *data
        size_t size
        int32_t n_dims
        int64_t dims[8]
    ctypedef struct AiorchInstance:
        uint32_t abi
        void *model
        int (*run)(void *model, const AiorchTensor *inputs, AiorchTensor *outputs, char *error,
                   size_t error_size) noexcept nogil
