"""Reads ModelInferRequest straight from memory; see wire_request.pxd."""

from libc.string cimport memcmp


cdef const uint8_t *read_varint(const uint8_t *at, const uint8_t *end, uint64_t *value) noexcept nogil:
    """Next position, or NULL when the varint is cut off or longer than ten bytes."""
    cdef uint64_t result = 0
    cdef int shift = 0
    cdef uint8_t byte
    while at < end and shift < 64:
        byte = at[0]
        at += 1
        result |= (<uint64_t> (byte & 0x7F)) << shift
        if not byte & 0x80:
            value[0] = result
            return at
        shift += 7
    return NULL


cdef const uint8_t *read_field(const uint8_t *at, const uint8_t *end, uint32_t *number, uint32_t *kind,
                               uint64_t *value, Slice *content) noexcept nogil:
    """Reads one field of any kind; `content` is set for length-delimited ones, `value` for varints.

    Gives NULL for what is cut off or not protobuf, which takes tags of five bytes at most. Groups (kinds 3 and 4)
    are refused too: nothing in the V2 service uses them, and the Python plane can still decide.
    """
    cdef uint64_t tag
    cdef const uint8_t *begin = at
    at = read_varint(at, end, &tag)
    if at == NULL or at - begin > 5 or tag > 0xFFFFFFFFULL or (tag >> 3) == 0:
        return NULL
    number[0] = <uint32_t> (tag >> 3)
    kind[0] = <uint32_t> (tag & 7)
    if kind[0] == 0:
        return read_varint(at, end, value)
    if kind[0] == 1:
        return at + 8 if end - at >= 8 else NULL
    if kind[0] == 5:
        return at + 4 if end - at >= 4 else NULL
    if kind[0] != 2:
        return NULL
    at = read_varint(at, end, value)
    if at == NULL or value[0] > <uint64_t> (end - at):
        return NULL
    content.data = at
    content.size = <size_t> value[0]
    return at + content.size


cdef bint is_named(const Slice *name, const char *text, size_t size) noexcept nogil:
    return name.size == size and memcmp(name.data, text, size) == 0


cdef bint is_ascii(const Slice *text) noexcept nogil:
    cdef size_t i
    for i in range(text.size):
        if text.data[i] & 0x80:
            return False
    return True


cdef ScanResult scan_tensor(Slice content, TensorView *tensor, bint *is_plain) noexcept nogil:
    """InferInputTensor: name 1, datatype 2, shape 3 (packed or not); parameters 4 and contents 5 are not plain."""
    cdef const uint8_t *at = content.data
    cdef const uint8_t *end = at + content.size
    cdef const uint8_t *inner
    cdef const uint8_t *inner_end
    cdef uint32_t number = 0, kind = 0
    cdef uint64_t value = 0
    cdef Slice field
    field.data = NULL
    field.size = 0
    tensor.name.data = tensor.datatype.data = tensor.data.data = NULL
    tensor.name.size = tensor.datatype.size = tensor.data.size = 0
    tensor.n_dims = 0
    while at < end:
        at = read_field(at, end, &number, &kind, &value, &field)
        if at == NULL:
            return SCAN_MALFORMED
        if number == 1 and kind == 2:       # the last one holds, as in protobuf; a request is declined
            is_plain[0] = is_plain[0] and tensor.name.data == NULL
            tensor.name = field
        elif number == 2 and kind == 2:
            is_plain[0] = is_plain[0] and tensor.datatype.data == NULL
            tensor.datatype = field
        elif number == 3 and kind == 2:
            inner, inner_end = field.data, field.data + field.size
            while inner < inner_end:
                inner = read_varint(inner, inner_end, &value)
                if inner == NULL:
                    return SCAN_MALFORMED
                if tensor.n_dims == MAX_DIMS:
                    is_plain[0] = False
                else:
                    tensor.dims[tensor.n_dims] = <int64_t> value
                    tensor.n_dims += 1
        elif number == 3 and kind == 0:
            if tensor.n_dims == MAX_DIMS:
                is_plain[0] = False
            else:
                tensor.dims[tensor.n_dims] = <int64_t> value
                tensor.n_dims += 1
        else:
            is_plain[0] = False
    return SCAN_OK


cdef ScanResult scan_parameter(Slice content, InferScan *scan) noexcept nogil:
    """One entry of the request's parameter map; only those that the queue understands are plain.

    triton_enable_empty_final_response is sent by Triton's C++ client on unary calls too and means nothing there.
    """
    cdef const uint8_t *at = content.data
    cdef const uint8_t *end = at + content.size
    cdef uint32_t number = 0, kind = 0, choice = 0
    cdef uint64_t value = 0
    cdef Slice key, field
    key.data = field.data = NULL
    key.size = field.size = 0
    cdef uint64_t number_value = 0
    cdef Slice inner
    cdef const uint8_t *end_of
    while at < end:
        at = read_field(at, end, &number, &kind, &value, &field)
        if at == NULL:
            return SCAN_MALFORMED
        if number == 1 and kind == 2 and key.data == NULL:
            key = field
        elif number == 2 and kind == 2:
            inner = field
            while inner.size:
                end_of = read_field(inner.data, inner.data + inner.size, &number, &kind, &value, &field)
                if end_of == NULL:
                    return SCAN_MALFORMED
                inner.size -= end_of - inner.data
                inner.data = end_of
                if choice or kind != 0:
                    scan.is_plain = False
                choice = number
                number_value = value
        else:
            scan.is_plain = False
    if is_named(&key, b"triton_enable_empty_final_response", 34) and choice == 1:
        return SCAN_OK
    # int64 (2) or uint64 (5): clients differ
    if is_named(&key, b"priority", 8) and (choice == 5 or choice == 2) and number_value <= 0x7FFFFFFFFFFFFFFFULL:
        scan.priority = number_value
    elif is_named(&key, b"timeout", 7) and choice == 2 and number_value <= 0x7FFFFFFFFFFFFFFFULL // 1000:
        scan.timeout_us = <int64_t> number_value
    else:
        scan.is_plain = False
    return SCAN_OK


cdef ScanResult scan_request(const uint8_t *message, size_t size, InferScan *scan) noexcept nogil:
    if scan_fields(message, size, scan) != SCAN_OK:
        return SCAN_MALFORMED
    join_contents(scan)
    return SCAN_OK


cdef ScanResult scan_parts(const uint8_t *head, size_t head_size, Slice tensor, InferScan *scan) noexcept nogil:
    if scan_fields(head, head_size, scan) != SCAN_OK:
        return SCAN_MALFORMED
    if scan.n_raw == MAX_TENSORS:
        scan.is_plain = False
    else:
        scan.raw[scan.n_raw] = tensor
        scan.n_raw += 1
    join_contents(scan)
    return SCAN_OK


cdef void join_contents(InferScan *scan) noexcept nogil:
    if scan.n_raw != scan.n_inputs:
        scan.is_plain = False
    for i in range(scan.n_inputs if scan.is_plain else 0):
        scan.inputs[i].data = scan.raw[i]


cdef ScanResult scan_fields(const uint8_t *message, size_t size, InferScan *scan) noexcept nogil:
    cdef const uint8_t *at = message
    cdef const uint8_t *end = message + size
    cdef const uint8_t *inner
    cdef uint32_t number = 0, kind = 0
    cdef uint64_t value = 0
    cdef Slice *text
    cdef Slice field
    field.data = NULL
    field.size = 0
    scan.model_name.data = scan.model_version.data = scan.id.data = NULL
    scan.model_name.size = scan.model_version.size = scan.id.size = 0
    scan.n_inputs = scan.n_raw = scan.n_outputs = 0
    scan.is_plain = True
    scan.priority = 0
    scan.timeout_us = 0
    while at < end:
        at = read_field(at, end, &number, &kind, &value, &field)
        if at == NULL:
            return SCAN_MALFORMED
        if kind != 2:
            scan.is_plain = False
        elif number <= 3:
            text = &scan.model_name if number == 1 else &scan.model_version if number == 2 else &scan.id
            # of a text that comes twice protobuf takes the last, and looks at each; an id must be UTF-8 to be echoed
            if text.data != NULL or (number == 3 and not is_ascii(&field)):
                scan.is_plain = False
            text[0] = field
        elif number == 4:
            if scan_parameter(field, scan) != SCAN_OK:
                return SCAN_MALFORMED
        elif number == 5:
            if scan.n_inputs == MAX_TENSORS:
                scan.is_plain = False
                continue
            if scan_tensor(field, &scan.inputs[scan.n_inputs], &scan.is_plain) != SCAN_OK:
                return SCAN_MALFORMED
            scan.n_inputs += 1
        elif number == 6:
            if scan.n_outputs == MAX_TENSORS:
                scan.is_plain = False
                continue
            scan.outputs[scan.n_outputs].data = NULL
            scan.outputs[scan.n_outputs].size = 0
            inner = field.data
            while inner < field.data + field.size:
                if scan.outputs[scan.n_outputs].data != NULL:
                    scan.is_plain = False
                inner = read_field(inner, field.data + field.size, &number, &kind, &value,
                                   &scan.outputs[scan.n_outputs])
                if inner == NULL:
                    return SCAN_MALFORMED
                if number != 1 or kind != 2:
                    scan.is_plain = False
            scan.n_outputs += 1
        elif number == 7:
            if scan.n_raw == MAX_TENSORS:
                scan.is_plain = False
                continue
            scan.raw[scan.n_raw] = field
            scan.n_raw += 1
        else:
            scan.is_plain = False
    return SCAN_OK


cdef size_t find_tensor(const uint8_t *head, size_t size, size_t message_size) noexcept nogil:
    cdef const uint8_t *at = head
    cdef const uint8_t *end = head + size
    cdef uint64_t tag, length = 0
    while at < end:
        at = read_varint(at, end, &tag)
        if at == NULL:
            return 0
        if tag & 7 == 0 or tag & 7 == 2:
            at = read_varint(at, end, &length)
            if at == NULL:
                return 0
        else:
            return 0
        if tag & 7 == 2:
            if tag >> 3 == 7 and length >= message_size // 2:
                return <size_t> (at - head)
            if length > <uint64_t> (end - at):
                return 0
            at += length
    return 0


cdef bint check_bytes_elements(const uint8_t *data, size_t size, int64_t count) noexcept nogil:
    cdef size_t at = 0
    while count > 0:
        if not skip_element(data, size, &at):
            return False
        count -= 1
    return at == size
