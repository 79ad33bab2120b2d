"""Policies of priority levels: made from what Python says, and what becomes of requests whose time is over."""

from libc.stdlib cimport calloc, free

from aiorch_server._core.queue cimport push_request


cdef object make_levels(Levels *levels, uint64_t count, uint64_t default_level, tuple own_policy, policies):
    cdef size_t n, at
    if count > MAX_LEVELS or default_level > count:
        raise ValueError(f"default priority level {default_level} of {count} levels")
    if count and not default_level:
        raise ValueError("priority levels need a default level of at least 1")
    every = [own_policy, *(policies or [own_policy] * <Py_ssize_t> count)]
    n = <size_t> len(every)
    if n != count + 1:
        raise ValueError(f"{n - 1} policies for {count} levels")
    for size, timeout_us, _, _ in every:
        if size < 0 or not 0 <= timeout_us <= MAX_SPAN_US:
            raise ValueError(f"a level's size {size} and timeout {timeout_us} must be 0 or more, and no overflow")
    levels.policies = <LevelPolicy *> calloc(n, sizeof(LevelPolicy))
    if levels.policies == NULL:
        raise MemoryError
    levels.count, levels.default_level = count, default_level
    for at in range(n):
        size, timeout_us, allows_override, delays = every[at]
        levels.policies[at].max_requests = size
        levels.policies[at].expiry_ns = timeout_us * 1000
        levels.policies[at].allows_override = allows_override
        levels.policies[at].delays = delays
        levels.is_bounded |= size > 0
        levels.has_delays |= bool(delays)


cdef void free_levels(Levels *levels) noexcept nogil:
    free(levels.policies)


cdef Request *delay_expired(Levels *levels, Queue *queue, Request *expired, int64_t now) noexcept nogil:
    cdef Request *refused = NULL
    cdef Request *following
    while expired != NULL:
        following = expired.next
        expired.next = NULL
        if policy_of(levels, expired).delays and not (expired.deadline_ns and expired.deadline_ns <= now):
            expired.expires_ns = 0
            expired.end_ns = expired.deadline_ns    # it was promised to be served, late as it is
            expired.level |= 1
            if push_request(queue, expired):
                expired = following
                continue
        expired.next = refused
        refused = expired
        expired = following
    return refused
