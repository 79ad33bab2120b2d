"""Waiting requests by tenant; see tenants.pxd."""

from libc.stdlib cimport calloc, free, realloc


cdef inline double holding_of(const Line *line) noexcept nogil:
    return <double> line.rows / line.weight


cdef inline size_t slot_of(uint64_t tenant) noexcept nogil:
    return <size_t> ((tenant * 0x9E3779B97F4A7C15ULL) >> 54)        # its upper ten bits: N_SLOTS


cdef inline Line *find_line(const Tenants *tenants, uint64_t tenant) noexcept nogil:
    cdef Line *line = tenants.slots[slot_of(tenant)]
    while line != NULL and line.tenant != tenant:
        line = line.next
    return line


cdef inline void put(Tenants *tenants, Py_ssize_t place, Line *line) noexcept nogil:
    tenants.heap[place] = line
    line.place = place


cdef void rise(Tenants *tenants, Line *line) noexcept nogil:
    cdef Py_ssize_t parent, place = line.place
    while place > 0:
        parent = (place - 1) // 2
        if holding_of(tenants.heap[parent]) >= holding_of(line):
            break
        put(tenants, place, tenants.heap[parent])
        place = parent
    put(tenants, place, line)


cdef void sink(Tenants *tenants, Line *line) noexcept nogil:
    cdef Py_ssize_t child, place = line.place
    while True:
        child = 2 * place + 1
        if child >= tenants.n:
            break
        if child + 1 < tenants.n and holding_of(tenants.heap[child + 1]) > holding_of(tenants.heap[child]):
            child += 1
        if holding_of(tenants.heap[child]) <= holding_of(line):
            break
        put(tenants, place, tenants.heap[child])
        place = child
    put(tenants, place, line)


cdef bint has_room(Tenants *tenants) noexcept nogil:
    """For one line more."""
    cdef Line **grown
    cdef Py_ssize_t capacity
    if tenants.n < tenants.capacity:
        return True
    capacity = 2 * tenants.capacity if tenants.capacity else 16
    grown = <Line **> realloc(tenants.heap, <size_t> capacity * sizeof(Line *))
    if grown == NULL:
        return False
    tenants.heap, tenants.capacity = grown, capacity
    return True


cdef Line *open_line(Tenants *tenants, uint64_t tenant) noexcept nogil:
    cdef Line *line = tenants.spare
    cdef Line **slot = &tenants.slots[slot_of(tenant)]
    if not has_room(tenants):
        return NULL
    if line != NULL:
        tenants.spare = NULL
    else:
        line = <Line *> calloc(1, sizeof(Line))
        if line == NULL:
            return NULL
    line.tenant, line.weight, line.rows, line.n, line.newest = tenant, 1.0, 0, 0, NULL
    line.next = slot[0]
    slot[0] = line
    put(tenants, tenants.n, line)
    tenants.n += 1
    return line


cdef void close_line(Tenants *tenants, Line *line) noexcept nogil:
    cdef Line **link = &tenants.slots[slot_of(line.tenant)]
    cdef Line *last
    while link[0] != line:
        link = &link[0].next
    link[0] = line.next
    tenants.n -= 1
    last = tenants.heap[tenants.n]
    if last != line:
        put(tenants, line.place, last)
        rise(tenants, last)
        sink(tenants, last)
    if tenants.spare == NULL:
        tenants.spare = line
    else:
        free(line)


cdef void join_line(Tenants **tenants, Request *request) noexcept nogil:
    cdef Line *line
    request.line = NULL
    if tenants[0] == NULL:
        tenants[0] = <Tenants *> calloc(1, sizeof(Tenants))
        if tenants[0] == NULL:
            return
    line = find_line(tenants[0], request.tenant)
    if line == NULL:
        line = open_line(tenants[0], request.tenant)
        if line == NULL:
            return
    request.line = line
    request.line_newer = NULL
    request.line_older = line.newest
    if line.newest != NULL:
        line.newest.line_newer = request
    line.newest = request
    line.rows += request.rows
    line.n += 1
    line.weight = request.weight if request.weight > 0 else 1.0
    rise(tenants[0], line)
    sink(tenants[0], line)      # its weight may have grown


cdef void leave_line(Tenants *tenants, Request *request) noexcept nogil:
    cdef Line *line = <Line *> request.line
    if request.line_older != NULL:
        request.line_older.line_newer = request.line_newer
    if request.line_newer != NULL:
        request.line_newer.line_older = request.line_older
    else:
        line.newest = request.line_older
    line.rows -= request.rows
    line.n -= 1
    request.line = NULL
    request.line_older = request.line_newer = NULL
    if line.n == 0:
        close_line(tenants, line)
    else:
        sink(tenants, line)


cdef void drop_tenants(Tenants *tenants) noexcept nogil:
    if tenants != NULL:
        free(tenants.spare)
        free(tenants.heap)
        free(tenants)


cdef Request *find_victim(Request *request, uint32_t level, bint is_same_level) noexcept nogil:
    for _ in range(MAX_PASSED):
        if request == NULL:
            break
        if request.level == level or not is_same_level and request.level > level and not request.level & 1:
            return request
        request = request.line_older
    return NULL


cdef double holding_with(const Tenants *tenants, const Request *request) noexcept nogil:
    cdef const Line *own = find_line(tenants, request.tenant)
    if own == NULL:
        return 0
    return <double> (own.rows + request.rows) / (request.weight if request.weight > 0 else 1.0)


cdef const Line *find_rival(const Tenants *tenants, const Request *request, bint is_same_level) noexcept nogil:
    cdef double most = holding_with(tenants, request)
    cdef const Line *found = NULL
    cdef const Line *line
    cdef Py_ssize_t place
    for place in range(min(tenants.n, <Py_ssize_t> MAX_HEAVY)):
        line = tenants.heap[place]
        if (line.n > 1 and line.tenant != request.tenant and holding_of(line) > most
                and find_victim(line.newest, request.level, is_same_level) != NULL):
            found, most = line, holding_of(line)
    return found
