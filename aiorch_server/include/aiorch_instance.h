/* A model instance that runs batches without the Python interpreter: what a compiled backend gives the server.
 *
 * A backend's ModelInstance offers it as a capsule named AIORCH_INSTANCE_CAPSULE (its property `compiled`). The capsule,
 * and with it the struct, must live until ModelInstance.close() returns. `run` is only ever called by the instance's own
 * thread, one batch at a time, never with the interpreter lock, which it must not take.
 */
#ifndef AIORCH_INSTANCE_H
#define AIORCH_INSTANCE_H

#include <stddef.h>
#include <stdint.h>

#define AIORCH_INSTANCE_CAPSULE "aiorch_instance"
#define AIORCH_INSTANCE_ABI 1
#define AIORCH_MAX_DIMS 8

/* A C-contiguous tensor; a batching model's first dimension is the number of rows. */
typedef struct {
    void *data;     /* NULL: an optional input that the batch leaves out; also an output of 0 bytes */
    size_t size;    /* bytes */
    int32_t n_dims;
    int64_t dims[AIORCH_MAX_DIMS];
} AiorchTensor;

typedef struct {
    uint32_t abi;   /* AIORCH_INSTANCE_ABI */
    void *model;
    /* Runs one batch. `inputs` and `outputs` are in the signature's order, only of types with a fixed item size.
     * Inputs are 64-byte aligned, must not be written, and are valid until `run` returns; outputs may alias them.
     * Output memory stays the model's, and valid until its next `run`. Returns 0, or anything else with a text for the
     * client, at most `error_size` bytes with the closing NUL, in `error`. */
    int (*run)(void *model, const AiorchTensor *inputs, AiorchTensor *outputs, char *error, size_t error_size);
} AiorchInstance;

#endif
