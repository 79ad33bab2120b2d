"""From a message to a place in the queue of the version that it names."""

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from aiorch_server._core.admission cimport ENQUEUED, REFUSED_FULL, REFUSED_LATE, EnqueueResult, enqueue, reserve_in_slab
from aiorch_server._core.counters cimport FAILURE_REJECTED, count_failure
from aiorch_server._core.passes cimport Pass, find_pass
from aiorch_server._core.quota cimport admit_request, give_back
from aiorch_server._core.request cimport (
    aiorch_add_reference,
    free_request,
    hold_memory,
    new_request,
    now_ns,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    put_settled,
)
from aiorch_server._core.scheduler cimport Scheduler
from aiorch_server._core.scheduler_state cimport release_scheduler, retain_scheduler, wake
from aiorch_server._core.shares cimport Shares, choose_share, release_shares, retain_shares
from aiorch_server._core.spec cimport bind_request, measure_rows
from aiorch_server._core.watch cimport choose
from aiorch_server._core.wire cimport put_varint, slice_equals
from aiorch_server._core.wire_request cimport (
    SCAN_OK,
    InferScan,
    ScanResult,
    find_head_size,
    find_tensor,
    scan_parts,
    scan_request,
)


cdef uint64_t hash_name(const Slice *name) noexcept nogil:
    cdef uint64_t value = 0xCBF29CE484222325ULL
    for i in range(name.size):
        value = (value ^ name.data[i]) * 0x100000001B3ULL
    return value


cdef const ModelRoute *find_model(const RouteTable *table, const Slice *name) noexcept nogil:
    cdef uint64_t hash = hash_name(name)
    cdef int slot = <int> (hash & <uint64_t> table.mask)
    while table.slots[slot].name.data != NULL:
        if table.slots[slot].hash == hash and slice_equals(&table.slots[slot].name, name):
            return &table.slots[slot]
        slot = (slot + 1) & table.mask
    return NULL


cdef SchedulerState *find_number(const ModelRoute *model, int64_t number) noexcept nogil:
    for at in range(model.n_versions):
        if model.versions[at].version == number:
            return model.versions[at].scheduler
    return NULL


cdef SchedulerState *find_share(const ModelRoute *model, RouteMark *mark) noexcept nogil:
    """The scheduler of the version that was chosen, or is now. NULL: the request is in the sample."""
    cdef SchedulerState *scheduler = NULL
    if mark.choice.version != 0:
        scheduler = find_number(model, mark.choice.version)
    if scheduler == NULL:       # or it went away since
        choose_share(model.shares, mark)
        scheduler = find_number(model, mark.choice.version)
    return NULL if mark.choice.is_sampled else scheduler


cdef SchedulerState *find_version(const ModelRoute *model, const Slice *version, RouteMark *mark) noexcept nogil:
    """The version's scheduler; an empty version is one by shares, or the default. NULL: not there, or not a plain number."""
    cdef int64_t number = 0
    if version.size == 0:
        if model.shares != NULL:
            return find_share(model, mark)
        return model.versions[model.default_index].scheduler if model.default_index >= 0 else NULL
    if version.size > 9:
        return NULL
    for i in range(version.size):
        if version.data[i] < c'0' or version.data[i] > c'9':
            return NULL
        number = number * 10 + (version.data[i] - c'0')
    return find_number(model, number)


cdef void free_table(RouteTable *table) noexcept nogil:
    cdef ModelRoute *model
    if table == NULL:
        return
    for slot in range(table.mask + 1 if table.slots != NULL else 0):
        model = &table.slots[slot]
        for i in range(model.n_versions):
            if model.versions[i].scheduler != NULL:
                release_scheduler(model.versions[i].scheduler)
        free(model.versions)
        if model.shares != NULL:
            release_shares(model.shares)
        free(<void *> model.name.data)
    free(table.slots)
    free(table)


cdef void release_table(RouteTable *table) noexcept nogil:
    if table != NULL and aiorch_add_reference(&table.references, -1) == 0:
        free_table(table)


cdef void retain_router(RouterState *router) noexcept nogil:
    aiorch_add_reference(&router.references, 1)


cdef void release_router(RouterState *router) noexcept nogil:
    if aiorch_add_reference(&router.references, -1) > 0:
        return
    release_table(router.table)
    pthread_mutex_destroy(&router.lock)
    free(router)


cdef void begin_round(RouterState *router, RouteReader *reader) noexcept nogil:
    pthread_mutex_lock(&router.lock)
    reader.table = router.table
    if reader.table != NULL:
        aiorch_add_reference(&reader.table.references, 1)
    pthread_mutex_unlock(&router.lock)


cdef void end_round(RouteReader *reader) noexcept nogil:
    wake_touched(reader)
    release_table(reader.table)
    reader.table = NULL


cdef void touch(RouteReader *reader, SchedulerState *scheduler) noexcept nogil:
    for i in range(reader.n_touched):
        if reader.touched[i] == scheduler:
            return
    if reader.n_touched == MAX_TOUCHED:
        wake_touched(reader)
    retain_scheduler(scheduler)     # its requests may be answered, and its table retired, before the round ends
    reader.touched[reader.n_touched] = scheduler
    reader.n_touched += 1


cdef void wake_touched(RouteReader *reader) noexcept nogil:
    for i in range(reader.n_touched):
        wake(reader.touched[i])
        release_scheduler(reader.touched[i])
    reader.n_touched = 0


cdef class Router:
    """The published route table; any number of threads read it, one at a time publishes."""

    def __cinit__(self):
        self.state = <RouterState *> calloc(1, sizeof(RouterState))
        if self.state == NULL:
            raise MemoryError
        self.state.references = 1
        pthread_mutex_init(&self.state.lock, NULL)

    def __dealloc__(self):
        if self.state != NULL:
            release_router(self.state)

    def publish(self, routes not None):
        """Replaces the table: ``{name: (default_version, {version: Scheduler})}``, or with ``Shares`` as a third.

        ``default_version`` is what a request without version gets; it must be among the versions, or 0 for none. With
        ``Shares``, all of whose versions must be there too, these say it. ValueError otherwise, and nothing changes.
        Requests that were dispatched before stay with the scheduler they went to.
        """
        cdef RouteTable *table = <RouteTable *> calloc(1, sizeof(RouteTable))
        cdef RouteTable *retired
        cdef int n_slots = 8
        if table == NULL:
            raise MemoryError
        table.references = 1
        try:
            while n_slots < 2 * len(routes):
                n_slots *= 2
            table.slots = <ModelRoute *> calloc(<size_t> n_slots, sizeof(ModelRoute))
            if table.slots == NULL:
                raise MemoryError
            table.mask = n_slots - 1
            for name, (default_version, versions, *shares) in routes.items():
                add_model(table, name, default_version, versions, shares[0] if shares else None)
        except BaseException:
            free_table(table)
            raise
        pthread_mutex_lock(&self.state.lock)
        retired = self.state.table
        self.state.table = table
        pthread_mutex_unlock(&self.state.lock)
        release_table(retired)


cdef SchedulerState *find_scheduler(const RouteTable *table, const InferScan *scan, RouteMark *mark) noexcept nogil:
    cdef const ModelRoute *model = find_model(table, &scan.model_name)
    return find_version(model, &scan.model_version, mark) if model != NULL else NULL


cdef bint place_tensor(RouterState *router, const uint8_t *head, size_t head_size, size_t message_size,
                       RouteMark *mark, Place *place) noexcept nogil:
    cdef RouteReader reader
    cdef InferScan scan
    cdef SchedulerState *scheduler
    cdef Slice tensor
    cdef size_t at = find_tensor(head, head_size, message_size)
    cdef size_t row_bytes
    cdef int64_t rows = 0
    cdef bint is_placed = False
    tensor.data, tensor.size = head, message_size - at      # never read
    # the length in front of it must say that it is the end, in as few bytes as it takes
    if at == 0 or not is_length(head, at, tensor.size):
        return False
    reader.n_touched = 0
    begin_round(router, &reader)
    if (reader.table != NULL and scan_parts(head, find_head_size(at, message_size), tensor, &scan) == SCAN_OK
            and scan.is_plain):
        scheduler = find_scheduler(reader.table, &scan, mark)
        if scheduler != NULL:
            row_bytes = measure_rows(scheduler.spec, &scan, &rows)
            is_placed = row_bytes > 0 and reserve_in_slab(scheduler, row_bytes, rows, place)
    end_round(&reader)
    place.at = at
    return is_placed


cdef bint is_length(const uint8_t *head, size_t at, size_t size) noexcept nogil:
    """Whether the bytes before `at` are the tag of a raw tensor and that length."""
    cdef uint8_t expected[16]
    cdef size_t n
    expected[0] = 7 << 3 | 2
    n = <size_t> (put_varint(expected + 1, size) - expected)
    return at > n and memcmp(head + at - n, expected, n) == 0


cdef void take_back(Request *candidate) noexcept nogil:
    """Frees a request whose memory stays the caller's."""
    candidate.message = NULL
    if candidate.holds != NULL:
        candidate.holds.buffer = NULL
    free_request(candidate)


cdef DispatchResult dispatch(RouteReader *reader, uint8_t *message, size_t size, const Place *rest,
                             int64_t received_ns, int64_t deadline_ns, const TraceParent *parent, RouteMark *mark,
                             const Claim *claim, CompletionSink *sink, void *owner, Request **request) noexcept nogil:
    cdef InferScan scan
    cdef ScanResult scanned
    cdef SchedulerState *scheduler
    cdef Request *candidate
    cdef EnqueueResult result
    cdef const Pass *found = NULL
    cdef int64_t now
    cdef Slice tensor
    tensor.data, tensor.size = NULL, 0
    if reader.table == NULL:
        return DECLINED
    if rest != NULL and rest.buffer != NULL:
        tensor.data, tensor.size = rest.data, size - rest.at
        scanned = scan_parts(message, find_head_size(rest.at, size), tensor, &scan)
    else:
        scanned = scan_request(message, size, &scan)
    if scanned != SCAN_OK or not scan.is_plain:
        return DECLINED
    now = now_ns()
    if claim != NULL:                   # first: strangers neither move the shares nor use up the samples
        found = find_pass(claim, &scan.model_name, now)
        if found == NULL:
            return DECLINED
    scheduler = find_scheduler(reader.table, &scan, mark)
    if scheduler == NULL or choose(&scheduler.watch, parent):
        return DECLINED
    candidate = new_request(message, size, scheduler.spec.n_inputs, scheduler.spec.n_key, sink, owner)
    if candidate == NULL:
        return DECLINED
    candidate.received_ns = received_ns
    candidate.deadline_ns = deadline_ns
    if parent != NULL and parent.is_present:
        candidate.parent = parent[0]
    if (not bind_request(scheduler.spec, &scan, candidate)
            or tensor.size and not hold_memory(candidate, tensor.data, tensor.size, rest.buffer, NULL)):
        take_back(candidate)
        return DECLINED
    if found != NULL:
        candidate.tenant, candidate.weight = found.tenant, found.weight
    if found != NULL and found.quota != NULL and not admit_request(found.quota, candidate, now):
        put_settled(sink, candidate, candidate)     # the tenant's doing: none of the model's failures
        request[0] = candidate
        return DISPATCHED
    result = enqueue(scheduler, candidate, scan.priority, scan.timeout_us, now)
    if result == ENQUEUED:
        touch(reader, scheduler)
        request[0] = candidate
        return DISPATCHED
    if candidate.quota != NULL:
        give_back(found.quota, candidate.rows)
    if result == REFUSED_FULL or result == REFUSED_LATE:
        # Answered here: under overload a refusal must cost less than a request.
        count_failure(&scheduler.counters, candidate, FAILURE_REJECTED, candidate.enqueued_ns)
        put_settled(sink, candidate, candidate)
    else:
        # Also where the scheduler is closed: the round's table may be a moment old, and the model loaded anew since.
        take_back(candidate)
        return DECLINED
    request[0] = candidate
    return DISPATCHED


cdef int add_model(RouteTable *table, str name, int64_t default_version, versions, Shares shares) except -1:
    cdef bytes text = name.encode()
    cdef Slice key
    cdef ModelRoute *model
    cdef uint8_t *copy
    cdef int slot
    cdef Scheduler scheduler
    key.data = <const uint8_t *> <char *> text
    key.size = <size_t> len(text)
    slot = <int> (hash_name(&key) & <uint64_t> table.mask)
    while table.slots[slot].name.data != NULL:
        slot = (slot + 1) & table.mask
    model = &table.slots[slot]
    copy = <uint8_t *> malloc(key.size + 1)
    model.versions = <VersionRoute *> calloc(<size_t> max(1, len(versions)), sizeof(VersionRoute))
    if copy == NULL or model.versions == NULL:
        free(copy)
        free(model.versions)
        model.versions = NULL
        raise MemoryError
    memcpy(copy, key.data, key.size)
    model.name.data = copy
    model.name.size = key.size
    model.hash = hash_name(&key)
    model.default_index = -1
    for number in sorted(versions):
        scheduler = versions[number]
        if number == default_version:
            model.default_index = model.n_versions
        model.versions[model.n_versions].version = number
        model.versions[model.n_versions].scheduler = scheduler.state
        retain_scheduler(scheduler.state)
        model.n_versions += 1
    if default_version and model.default_index < 0:
        raise ValueError(f"default version {default_version} of '{name}' is not among {sorted(versions)}")
    if shares is not None:
        if any([number not in versions for number in shares.versions]):
            raise ValueError(f"shares of '{name}' are for {shares.versions}, not all among {sorted(versions)}")
        model.shares = shares.table
        retain_shares(model.shares)
    return 0
