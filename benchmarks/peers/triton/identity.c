/* The cheapest useful Triton backend: stacks the rows of a batch into one buffer, as a model would need them, and
 * sends each request its own rows back. Declarations follow Triton's public backend API (tritonbackend.h, API 1.x);
 * the server resolves them when it opens this library. No statistics are reported, which only saves it work. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct TRITONSERVER_Error TRITONSERVER_Error;
typedef struct TRITONBACKEND_ModelInstance TRITONBACKEND_ModelInstance;
typedef struct TRITONBACKEND_Request TRITONBACKEND_Request;
typedef struct TRITONBACKEND_Response TRITONBACKEND_Response;
typedef struct TRITONBACKEND_Input TRITONBACKEND_Input;
typedef struct TRITONBACKEND_Output TRITONBACKEND_Output;
typedef int TRITONSERVER_DataType;
typedef int TRITONSERVER_MemoryType;

enum { MEMORY_CPU = 0, ERROR_INTERNAL = 1, RESPONSE_COMPLETE_FINAL = 1, REQUEST_RELEASE_ALL = 1 };

extern TRITONSERVER_Error* TRITONSERVER_ErrorNew(int code, const char* message);
extern void TRITONSERVER_ErrorDelete(TRITONSERVER_Error* error);
extern TRITONSERVER_Error* TRITONBACKEND_RequestInputByIndex(
    TRITONBACKEND_Request* request, uint32_t index, TRITONBACKEND_Input** input);
extern TRITONSERVER_Error* TRITONBACKEND_InputProperties(
    TRITONBACKEND_Input* input, const char** name, TRITONSERVER_DataType* datatype, const int64_t** shape,
    uint32_t* dims_count, uint64_t* byte_size, uint32_t* buffer_count);
extern TRITONSERVER_Error* TRITONBACKEND_InputBuffer(
    TRITONBACKEND_Input* input, uint32_t index, const void** buffer, uint64_t* byte_size,
    TRITONSERVER_MemoryType* memory_type, int64_t* memory_type_id);
extern TRITONSERVER_Error* TRITONBACKEND_ResponseNew(TRITONBACKEND_Response** response, TRITONBACKEND_Request* request);
extern TRITONSERVER_Error* TRITONBACKEND_ResponseOutput(
    TRITONBACKEND_Response* response, TRITONBACKEND_Output** output, const char* name, TRITONSERVER_DataType datatype,
    const int64_t* shape, uint32_t dims_count);
extern TRITONSERVER_Error* TRITONBACKEND_OutputBuffer(
    TRITONBACKEND_Output* output, void** buffer, uint64_t byte_size, TRITONSERVER_MemoryType* memory_type,
    int64_t* memory_type_id);
extern TRITONSERVER_Error* TRITONBACKEND_ResponseSend(
    TRITONBACKEND_Response* response, uint32_t flags, TRITONSERVER_Error* error);
extern TRITONSERVER_Error* TRITONBACKEND_RequestRelease(TRITONBACKEND_Request* request, uint32_t flags);

typedef struct {
  TRITONBACKEND_Input* input;
  TRITONSERVER_DataType datatype;
  const int64_t* shape;
  uint32_t dims_count;
  uint32_t buffer_count;
  uint64_t byte_size;
  uint64_t offset; /* of this request's rows in the stacked batch */
} Member;

static TRITONSERVER_Error* describe(TRITONBACKEND_Request* request, Member* member)
{
  const char* name;
  TRITONSERVER_Error* error = TRITONBACKEND_RequestInputByIndex(request, 0, &member->input);
  if (error != NULL) return error;
  return TRITONBACKEND_InputProperties(
      member->input, &name, &member->datatype, &member->shape, &member->dims_count, &member->byte_size,
      &member->buffer_count);
}

static TRITONSERVER_Error* gather(const Member* member, char* batch)
{
  char* place = batch + member->offset;
  const char* end = place + member->byte_size;
  for (uint32_t index = 0; index < member->buffer_count; index++) {
    const void* source;
    uint64_t byte_size;
    TRITONSERVER_MemoryType memory_type = MEMORY_CPU;
    int64_t memory_type_id = 0;
    TRITONSERVER_Error* error =
        TRITONBACKEND_InputBuffer(member->input, index, &source, &byte_size, &memory_type, &memory_type_id);
    if (error != NULL) return error;
    if (byte_size > (uint64_t)(end - place)) return TRITONSERVER_ErrorNew(ERROR_INTERNAL, "input longer than declared");
    memcpy(place, source, byte_size);
    place += byte_size;
  }
  return NULL;
}

static TRITONSERVER_Error* scatter(TRITONBACKEND_Response* response, const Member* member, const char* batch)
{
  TRITONBACKEND_Output* output;
  TRITONSERVER_Error* error = TRITONBACKEND_ResponseOutput(
      response, &output, "OUTPUT0", member->datatype, member->shape, member->dims_count);
  if (error != NULL) return error;
  void* target;
  TRITONSERVER_MemoryType memory_type = MEMORY_CPU;
  int64_t memory_type_id = 0;
  error = TRITONBACKEND_OutputBuffer(output, &target, member->byte_size, &memory_type, &memory_type_id);
  if (error != NULL) return error;
  memcpy(target, batch + member->offset, member->byte_size);
  return NULL;
}

static void drop(TRITONSERVER_Error* error)
{
  if (error != NULL) TRITONSERVER_ErrorDelete(error);
}

/* Answers and releases a request exactly once, with its rows or with the error that it met. */
static void settle(TRITONBACKEND_Request* request, const Member* member, const char* batch, TRITONSERVER_Error* error)
{
  TRITONBACKEND_Response* response = NULL;
  TRITONSERVER_Error* refused = TRITONBACKEND_ResponseNew(&response, request);
  if (refused == NULL) {
    if (error == NULL) error = scatter(response, member, batch);
    drop(TRITONBACKEND_ResponseSend(response, RESPONSE_COMPLETE_FINAL, error)); /* does not take the error over */
  }
  drop(error);
  drop(refused);
  drop(TRITONBACKEND_RequestRelease(request, REQUEST_RELEASE_ALL));
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceExecute(
    TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests, const uint32_t request_count)
{
  (void)instance;
  Member* members = calloc(request_count, sizeof(Member));
  TRITONSERVER_Error** errors = calloc(request_count, sizeof(TRITONSERVER_Error*));
  uint64_t total = 0;
  if (members != NULL && errors != NULL) {
    for (uint32_t index = 0; index < request_count; index++) {
      errors[index] = describe(requests[index], &members[index]);
      members[index].offset = total;
      if (errors[index] == NULL) total += members[index].byte_size;
    }
  }
  char* batch = malloc(total + 1);
  if (members == NULL || errors == NULL || batch == NULL) {
    /* With an error returned, the requests stay Triton's and it answers them itself. */
    for (uint32_t index = 0; errors != NULL && index < request_count; index++) drop(errors[index]);
    free(members);
    free(errors);
    free(batch);
    return TRITONSERVER_ErrorNew(ERROR_INTERNAL, "out of memory");
  }
  for (uint32_t index = 0; index < request_count; index++) {
    if (errors[index] == NULL) errors[index] = gather(&members[index], batch);
  }
  for (uint32_t index = 0; index < request_count; index++) {
    settle(requests[index], &members[index], batch, errors[index]);
  }
  free(members);
  free(errors);
  free(batch);
  return NULL;
}
