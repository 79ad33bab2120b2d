/* The few calls of ONNX Runtime's C API that the backend makes, through the table that the library gives out.
 *
 * The API is a table of functions that only ever grows at its end, so each call has a fixed position
 * (https://onnxruntime.ai/docs/api/c/struct_ort_api.html); the library's own header does not come with its wheel.
 */
#ifndef AIORCH_ORT_API_H
#define AIORCH_ORT_API_H

#include <stddef.h>
#include <stdint.h>

#define ORT_API_LEAST_VERSION 14

typedef void *const *OrtTable;
typedef struct { OrtTable (*get_table)(uint32_t version); const char *(*get_version)(void); } OrtBase;

/* What a call gives back: NULL, or a status that ort_release(table, ORT_STATUS, status) frees. */
typedef void OrtStatus;

enum { ORT_STATUS = 93, ORT_SESSION = 95, ORT_VALUE = 96, ORT_TYPE = 98, ORT_SHAPE = 99, ORT_OPTIONS = 100 };

#define ORT_CALL(position, ...) ((OrtStatus *(*)(__VA_ARGS__)) table[position])

static inline const char *ort_message(OrtTable table, const OrtStatus *status)
{ return ((const char *(*)(const void *)) table[2])(status); }
static inline void ort_release(OrtTable table, int kind, void *object)
{ ((void (*)(void *)) table[kind])(object); }

/* --- once per process */
static inline OrtStatus *ort_create_environment(OrtTable table, int log_level, const char *name, void **out)
{ return ORT_CALL(3, int, const char *, void **)(log_level, name, out); }
static inline OrtStatus *ort_get_allocator(OrtTable table, void **out)
{ return ORT_CALL(78, void **)(out); }
static inline OrtStatus *ort_describe_cpu_memory(OrtTable table, void **out)
{ return ORT_CALL(69, int, int, void **)(1 /* arena */, 0 /* default */, out); }

/* --- options */
static inline OrtStatus *ort_create_options(OrtTable table, void **out)
{ return ORT_CALL(10, void **)(out); }
static inline OrtStatus *ort_set_sequential(OrtTable table, void *options)
{ return ORT_CALL(13, void *, int)(options, 0); }
static inline OrtStatus *ort_set_log_level(OrtTable table, void *options, int level)
{ return ORT_CALL(22, void *, int)(options, level); }
static inline OrtStatus *ort_set_optimization(OrtTable table, void *options, int level)
{ return ORT_CALL(23, void *, int)(options, level); }
static inline OrtStatus *ort_set_intra_threads(OrtTable table, void *options, int threads)
{ return ORT_CALL(24, void *, int)(options, threads); }
static inline OrtStatus *ort_set_inter_threads(OrtTable table, void *options, int threads)
{ return ORT_CALL(25, void *, int)(options, threads); }
static inline OrtStatus *ort_set_entry(OrtTable table, void *options, const char *key, const char *value)
{ return ORT_CALL(130, void *, const char *, const char *)(options, key, value); }

/* --- sessions; kinds of tensors: 0 inputs, 1 outputs, 2 overridable initializers */
static inline OrtStatus *ort_open(OrtTable table, void *environment, const char *path, void *options, void **out)
{ return ORT_CALL(7, void *, const char *, void *, void **)(environment, path, options, out); }
static inline OrtStatus *ort_count(OrtTable table, void *session, int kind, size_t *out)
{ return ORT_CALL(30 + kind, void *, size_t *)(session, out); }
static inline OrtStatus *ort_get_type(OrtTable table, void *session, int kind, size_t index, void **out)
{ return ORT_CALL(33 + kind, void *, size_t, void **)(session, index, out); }
static inline OrtStatus *ort_get_name(OrtTable table, void *session, int kind, size_t index, void *allocator, char **out)
{ return ORT_CALL(36 + kind, void *, size_t, void *, char **)(session, index, allocator, out); }
static inline OrtStatus *ort_free(OrtTable table, void *allocator, void *memory)
{ return ORT_CALL(76, void *, void *)(allocator, memory); }
/* *out is part of the type and NULL when the type is not a tensor's */
static inline OrtStatus *ort_get_tensor_type(OrtTable table, void *type, void **out)
{ return ORT_CALL(55, void *, void **)(type, out); }
static inline OrtStatus *ort_get_element(OrtTable table, void *shape, int *out)
{ return ORT_CALL(60, void *, int *)(shape, out); }
static inline OrtStatus *ort_count_dims(OrtTable table, void *shape, size_t *out)
{ return ORT_CALL(61, void *, size_t *)(shape, out); }
static inline OrtStatus *ort_get_dims(OrtTable table, void *shape, int64_t *out, size_t n)
{ return ORT_CALL(62, void *, int64_t *, size_t)(shape, out, n); }

/* --- running */
static inline OrtStatus *ort_wrap_tensor(OrtTable table, void *memory, void *data, size_t size, const int64_t *dims,
                                         size_t n_dims, int element, void **out)
{
    return ORT_CALL(49, void *, void *, size_t, const int64_t *, size_t, int, void **)(
        memory, data, size, dims, n_dims, element, out);
}
static inline OrtStatus *ort_run(OrtTable table, void *session, const char *const *input_names, void *const *inputs,
                                 size_t n_inputs, const char *const *output_names, size_t n_outputs, void **outputs)
{
    return ORT_CALL(9, void *, void *, const char *const *, void *const *, size_t, const char *const *, size_t, void **)(
        session, NULL, input_names, inputs, n_inputs, output_names, n_outputs, outputs);
}
static inline OrtStatus *ort_get_data(OrtTable table, void *value, void **out)
{ return ORT_CALL(51, void *, void **)(value, out); }
static inline OrtStatus *ort_get_shape(OrtTable table, void *value, void **out)
{ return ORT_CALL(65, void *, void **)(value, out); }

#endif
