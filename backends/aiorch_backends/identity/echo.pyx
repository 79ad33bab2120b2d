"""The identity model as a compiled instance: the smallest example of one."""

from cpython.pycapsule cimport PyCapsule_New
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint32_t

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int us)

cdef extern from "aiorch_instance.h" nogil:
    const char *AIORCH_INSTANCE_CAPSULE
    enum:
        AIORCH_INSTANCE_ABI
    ctypedef struct AiorchTensor:
        void *data
    ctypedef struct AiorchInstance:
        uint32_t abi
        void *model
        int (*run)(void *model, const AiorchTensor *inputs, AiorchTensor *outputs, char *error,
                   size_t error_size) noexcept nogil


cdef struct EchoState:
    int n_tensors
    unsigned int delay_us


cdef int run_echo(void *model, const AiorchTensor *inputs, AiorchTensor *outputs, char *error,
                  size_t error_size) noexcept nogil:
    cdef EchoState *state = <EchoState *> model
    if state.delay_us:
        usleep(state.delay_us)
    for i in range(state.n_tensors):
        outputs[i] = inputs[i]
    return 0


cdef class Echo:
    """``capsule`` gives back the first ``n_tensors`` inputs, after ``delay_us`` microseconds."""

    cdef EchoState state
    cdef AiorchInstance instance
    cdef readonly object capsule

    def __init__(self, int n_tensors, unsigned int delay_us):
        self.state.n_tensors, self.state.delay_us = n_tensors, delay_us
        self.instance.abi, self.instance.model, self.instance.run = AIORCH_INSTANCE_ABI, &self.state, run_echo
        self.capsule = PyCapsule_New(&self.instance, AIORCH_INSTANCE_CAPSULE, NULL)
