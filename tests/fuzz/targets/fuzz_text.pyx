"""Target ``text``: the small texts of gRPC, with what is true of each result."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, free, malloc
from libc.string cimport memcmp, memcpy

from aiorch_server._core.grpc_text cimport *
from aiorch_server._core.wire_request cimport check_bytes_elements


cdef void demand(bint is_true, const char *law) noexcept nogil:
    if not is_true:
        fprintf(stderr, "broken: %s\n", law)
        abort()


cdef uint8_t read_digit(uint8_t text) noexcept nogil:
    demand(c'0' <= text <= c'9' or c'A' <= text <= c'F', "an encoded byte has two digits, upper case")
    return text - c'0' if text <= c'9' else text - c'A' + 10


cdef void check_percent(const uint8_t *text, size_t size) noexcept nogil:
    """Decoded again it is the same, and all of it may stand in a header."""
    cdef uint8_t *encoded = <uint8_t *> malloc(3 * size + 1)
    cdef uint8_t *decoded = <uint8_t *> malloc(size + 1)
    cdef size_t i = 0, n = 0, encoded_size = percent_encode(text, size, encoded)
    demand(encoded_size <= 3 * size, "three for one is enough")
    while i < encoded_size:
        demand(0x20 <= encoded[i] <= 0x7E, "only printable ASCII is sent")
        if encoded[i] == c'%':
            demand(encoded_size - i >= 3, "an encoded byte has two digits, upper case")
            decoded[n] = read_digit(encoded[i + 1]) << 4 | read_digit(encoded[i + 2])
            i += 3
        else:
            decoded[n] = encoded[i]
            i += 1
        n += 1
    demand(n == size and (size == 0 or memcmp(decoded, text, size) == 0), "decoding gives the text again")
    free(encoded)
    free(decoded)


cdef void check_cut(const uint8_t *text, size_t size) noexcept nogil:
    """A text repeated until it is too long is cut to what may be sent, and says how long that is."""
    cdef size_t repeats = MAX_STATUS_TEXT_BYTES // (size + 1) + 2, i, cut, said = 0
    cdef uint8_t *longer = <uint8_t *> malloc(repeats * size + 1)
    cdef uint8_t *encoded = <uint8_t *> malloc(3 * repeats * size + 1)
    for i in range(repeats):
        if size:
            memcpy(longer + i * size, text, size)
    cut = cut_status_text(longer, repeats * size, &said)
    demand(cut <= repeats * size, "a cut makes no text longer")
    demand(said <= MAX_STATUS_TEXT_BYTES, "a status message is within bounds")
    demand(percent_encode(longer, cut, encoded) <= said, "there is room for a status message")
    free(longer)
    free(encoded)


cdef int run_text(const uint8_t *data, size_t size) noexcept nogil:
    cdef int64_t timeout
    cdef size_t i
    cdef uint8_t *text
    cdef uint8_t prefix[5]
    if size < 1 or size > 4096:
        return 0
    # a copy of its own, so that reading behind the end is seen
    text = <uint8_t *> malloc(size)
    memcpy(text, data, size)
    timeout = parse_timeout(text, size)
    demand(-1 <= timeout <= <int64_t> MAX_TIMEOUT_S * 1_000_000_000, "timeouts are within bounds")
    if timeout >= 0:
        demand(2 <= size <= 9, "a timeout has 1 to 8 digits and a unit")
        for i in range(size - 1):
            demand(c'0' <= text[i] <= c'9', "a timeout has 1 to 8 digits and a unit")
    if is_grpc_content_type(text, size):
        demand(size >= 16 and memcmp(text, b"application/grpc", 16) == 0, "gRPC's content-type says so")
    if size >= 5:
        put_frame_prefix(prefix, read_frame_size(text))
        demand(memcmp(prefix + 1, text + 1, 4) == 0, "a frame's size is written as it was read")
    check_bytes_elements(text, size, text[0])
    check_percent(text, size)
    check_cut(text, size)
    free(text)
    return 0


TARGETS = {"text": <size_t> &run_text}
