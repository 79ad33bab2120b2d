# Small texts of the gRPC protocol, on memory alone: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t


cdef enum:
    MAX_TIMEOUT_S = 1_000_000_000       # some 30 years: longer ones are cut, so that sums cannot overflow

# "TimeoutValue TimeoutUnit": at most 8 digits and one of H M S m u n. Nanoseconds, or -1 when malformed.
cdef inline int64_t parse_timeout(const uint8_t *text, size_t size) noexcept nogil:
    cdef int64_t value = 0, unit_ns, limit_ns = <int64_t> MAX_TIMEOUT_S * 1_000_000_000
    cdef size_t i
    if size < 2 or size > 9:
        return -1
    for i in range(size - 1):
        if text[i] < c'0' or text[i] > c'9':
            return -1
        value = value * 10 + (text[i] - c'0')
    if text[size - 1] == c'H':
        unit_ns = 3600 * <int64_t> 1_000_000_000
    elif text[size - 1] == c'M':
        unit_ns = 60 * <int64_t> 1_000_000_000
    elif text[size - 1] == c'S':
        unit_ns = 1_000_000_000
    elif text[size - 1] == c'm':
        unit_ns = 1_000_000
    elif text[size - 1] == c'u':
        unit_ns = 1_000
    elif text[size - 1] == c'n':
        unit_ns = 1
    else:
        return -1
    return limit_ns if value > limit_ns // unit_ns else value * unit_ns


# Percent-encodes a status message: all but printable ASCII, and the percent sign. `out` holds 3 * size bytes.
# Gives the number of bytes written.
cdef inline size_t percent_encode(const uint8_t *text, size_t size, uint8_t *out) noexcept nogil:
    cdef const char *digits = "0123456789ABCDEF"
    cdef size_t i, n = 0
    for i in range(size):
        if 0x20 <= text[i] <= 0x7e and text[i] != c'%':
            out[n] = text[i]
            n += 1
        else:
            out[n] = c'%'
            out[n + 1] = <uint8_t> digits[text[i] >> 4]
            out[n + 2] = <uint8_t> digits[text[i] & 15]
            n += 3
    return n


cdef enum:
    MAX_STATUS_TEXT_BYTES = 6144        # percent-encoded: clients bound what they accept in trailers, often at 8 KiB

# How many bytes of a status message may be sent, cut between two characters; `encoded_size` is what they become.
cdef inline size_t cut_status_text(const uint8_t *text, size_t size, size_t *encoded_size) noexcept nogil:
    cdef size_t i = 0, cost
    encoded_size[0] = 0
    while i < size:
        cost = 1 if 0x20 <= text[i] <= 0x7e and text[i] != c'%' else 3
        if encoded_size[0] + cost > MAX_STATUS_TEXT_BYTES:
            while i > 0 and (text[i] & 0xC0) == 0x80:
                i -= 1
            break
        encoded_size[0] += cost
        i += 1
    return i


# Writes a number in digits; gives how many.
cdef inline size_t put_decimal(char *out, size_t value) noexcept nogil:
    cdef char digits[24]
    cdef size_t n = 0, i
    while True:
        digits[n] = <char> (c'0' + value % 10)
        n += 1
        value //= 10
        if value == 0:
            break
    for i in range(n):
        out[i] = digits[n - 1 - i]
    return n


# The 5 bytes in front of each message: compressed flag, length (big endian).
cdef inline void put_frame_prefix(uint8_t *out, size_t size) noexcept nogil:
    out[0] = 0
    out[1] = <uint8_t> (size >> 24)
    out[2] = <uint8_t> (size >> 16)
    out[3] = <uint8_t> (size >> 8)
    out[4] = <uint8_t> size


cdef inline size_t read_frame_size(const uint8_t *prefix) noexcept nogil:
    return (<size_t> prefix[1] << 24) | (<size_t> prefix[2] << 16) | (<size_t> prefix[3] << 8) | prefix[4]


# Whether a content-type is gRPC's: "application/grpc", alone or followed by "+" or ";". Not "application/grpc-web".
cdef inline bint is_grpc_content_type(const uint8_t *text, size_t size) noexcept nogil:
    cdef const char *wanted = "application/grpc"
    cdef size_t i
    if size < 16:
        return False
    for i in range(16):
        if text[i] != <uint8_t> wanted[i]:
            return False
    return size == 16 or text[16] == c'+' or text[16] == c';'
