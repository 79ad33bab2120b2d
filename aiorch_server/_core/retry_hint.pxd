# What a refusal tells of the time to try again, as packed trailing metadata of a gRPC status, on memory alone:
# `grpc-retry-pushback-ms` (gRFC A6) and `grpc-status-details-bin`, a google.rpc.Status with a google.rpc.RetryInfo
# (https://google.aip.dev/193). The Python plane writes the same: frontends/grpc/retry.py.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from aiorch_server._core.grpc_text cimport put_decimal
from aiorch_server._core.wire cimport put_varint

cdef enum:
    MAX_TOLD_BYTES = 1024       # texts that are told again in the details: clients bound what they accept in trailers
    HINT_BYTES = 2048           # room for the whole

cdef extern from * nogil:
    """
    static const char AIORCH_PUSHBACK[] = "grpc-retry-pushback-ms";
    static const char AIORCH_DETAILS[] = "grpc-status-details-bin";
    static const char AIORCH_RETRY_INFO[] = "type.googleapis.com/google.rpc.RetryInfo";
    static const char AIORCH_BASE64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    """
    const char AIORCH_PUSHBACK[23]
    const char AIORCH_DETAILS[24]
    const char AIORCH_RETRY_INFO[41]
    const char AIORCH_BASE64[65]


# A field of bytes.
cdef inline uint8_t *put_bytes(uint8_t *at, uint8_t tag, const void *data, size_t size) noexcept nogil:
    at[0] = tag
    at = put_varint(at + 1, size)
    memcpy(at, data, size)
    return at + size


# google.rpc.Status { code, message, details { Any of RetryInfo { retry_delay { seconds, nanos } } } }; how many bytes.
cdef inline size_t put_status(uint8_t *out, int status, const char *text, size_t size, int64_t pause_ns) noexcept nogil:
    cdef uint8_t delay[32]
    cdef uint8_t info[40]
    cdef uint8_t details[128]
    cdef uint8_t *end
    cdef uint8_t *at = out
    delay[0] = 1 << 3
    end = put_varint(delay + 1, <uint64_t> (pause_ns // 1000000000))
    end[0] = 2 << 3
    end = put_varint(end + 1, <uint64_t> (pause_ns % 1000000000))
    end = put_bytes(info, 1 << 3 | 2, delay, <size_t> (end - delay))
    end = put_bytes(put_bytes(details, 1 << 3 | 2, AIORCH_RETRY_INFO, sizeof(AIORCH_RETRY_INFO) - 1),
                    2 << 3 | 2, info, <size_t> (end - info))
    at[0] = 1 << 3
    at = put_varint(at + 1, <uint64_t> status)
    at = put_bytes(at, 2 << 3 | 2, text, size)
    at = put_bytes(at, 3 << 3 | 2, details, <size_t> (end - details))
    return <size_t> (at - out)


# Without padding, as gRPC wants it; how many characters.
cdef inline size_t put_base64(uint8_t *out, const uint8_t *data, size_t size) noexcept nogil:
    cdef uint32_t bits
    cdef size_t i, at = 0, left
    for i in range(0, size, 3):
        left = size - i
        bits = <uint32_t> data[i] << 16
        if left > 1:
            bits |= <uint32_t> data[i + 1] << 8
        if left > 2:
            bits |= data[i + 2]
        out[at] = <uint8_t> AIORCH_BASE64[bits >> 18]
        out[at + 1] = <uint8_t> AIORCH_BASE64[bits >> 12 & 63]
        at += 2
        if left > 1:
            out[at] = <uint8_t> AIORCH_BASE64[bits >> 6 & 63]
            at += 1
        if left > 2:
            out[at] = <uint8_t> AIORCH_BASE64[bits & 63]
            at += 1
    return at


# The trailing metadata of a refusal, packed into HINT_BYTES: names and values, each pair behind its two sizes. `text` is
# what the status says; the details are left out where it is longer than MAX_TOLD_BYTES.
cdef inline size_t pack_hint(uint8_t *out, int status, const char *text, size_t size, int64_t pause_ns) noexcept nogil:
    cdef uint8_t message[MAX_TOLD_BYTES + 192]
    cdef uint32_t sizes[2]
    cdef uint8_t *start = out
    cdef uint8_t *at = out + sizeof(sizes)
    memcpy(at, AIORCH_PUSHBACK, sizeof(AIORCH_PUSHBACK) - 1)
    at += sizeof(AIORCH_PUSHBACK) - 1
    sizes[0] = sizeof(AIORCH_PUSHBACK) - 1
    sizes[1] = <uint32_t> put_decimal(<char *> at, <size_t> ((pause_ns + 999999) // 1000000))
    at += sizes[1]
    memcpy(out, sizes, sizeof(sizes))
    if size > MAX_TOLD_BYTES:
        return <size_t> (at - start)
    out, at = at, at + sizeof(sizes)
    memcpy(at, AIORCH_DETAILS, sizeof(AIORCH_DETAILS) - 1)
    at += sizeof(AIORCH_DETAILS) - 1
    sizes[0] = sizeof(AIORCH_DETAILS) - 1
    sizes[1] = <uint32_t> put_base64(at, message, put_status(message, status, text, size, pause_ns))
    at += sizes[1]
    memcpy(out, sizes, sizeof(sizes))
    return <size_t> (at - start)
