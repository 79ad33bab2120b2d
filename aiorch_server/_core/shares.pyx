"""The shares of a model's versions; see shares.pxd."""

from libc.math cimport log
from libc.stdlib cimport calloc, free

from aiorch_server._core.request cimport aiorch_add_reference

cdef extern from * nogil:
    """
    static inline uint64_t aiorch_take_turn(uint64_t *turns) { return __atomic_fetch_add(turns, 1, __ATOMIC_RELAXED); }
    static inline uint64_t aiorch_read_turns(const uint64_t *turns) { return __atomic_load_n(turns, __ATOMIC_RELAXED); }
    """
    uint64_t aiorch_take_turn(uint64_t *turns)
    uint64_t aiorch_read_turns(const uint64_t *turns)

# Parts of 2**64. The golden section spreads the multiples best; the two together spread over a square as well.
cdef uint64_t VERSION_STEP = 0x9E3779B97F4A7C15ULL      # (5 ** 0.5 - 1) / 2
cdef double UNIT = 1.0 / 9007199254740992.0             # 2 ** -53: there are so many numbers below 1
cdef uint64_t SAMPLE_STEP = 0xBB67AE8584CAA73BULL       # 3 ** 0.5 - 1


cdef void retain_shares(ShareTable *table) noexcept nogil:
    aiorch_add_reference(&table.references, 1)


cdef void release_shares(ShareTable *table) noexcept nogil:
    if aiorch_add_reference(&table.references, -1) == 0:
        free(table)


cdef uint64_t mix(uint64_t value) noexcept nogil:
    """Each bit of the result depends on each of the value (MurmurHash3's last steps)."""
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCDULL
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53ULL
    return value ^ value >> 33


cdef uint64_t hash_key(const uint8_t *text, size_t size) noexcept nogil:
    cdef uint64_t value = 0xCBF29CE484222325ULL
    for i in range(size):
        value = (value ^ text[i]) * 0x100000001B3ULL
    return mix(value)


cdef int64_t find_by_point(const ShareTable *table, uint64_t point) noexcept nogil:
    for i in range(table.n_shares - 1):
        if point < table.shares[i].bound:
            return table.shares[i].version
    return table.shares[table.n_shares - 1].version


cdef int64_t find_by_key(const ShareTable *table, uint64_t key) noexcept nogil:
    cdef double drawn, distance, shortest = 0
    cdef int best = 0
    for i in range(table.n_shares):
        drawn = <double> ((mix(key ^ <uint64_t> table.shares[i].version * VERSION_STEP) >> 11) + 1) * UNIT
        distance = -log(drawn) / table.shares[i].weight
        if i == 0 or distance < shortest:
            best, shortest = i, distance
    return table.shares[best].version


cdef void choose_share(ShareTable *table, RouteMark *mark) noexcept nogil:
    cdef uint64_t turn = 0
    if table.is_sticky and mark.has_key:
        mark.choice.version = find_by_key(table, mark.key)
        if table.is_sampled:
            turn = aiorch_take_turn(&table.keyed_turns)
    else:
        turn = aiorch_take_turn(&table.turns)
        mark.choice.version = find_by_point(table, turn * VERSION_STEP)
    mark.choice.is_sampled = table.is_sampled and turn * SAMPLE_STEP <= table.sample_bound


cdef class Shares:
    """Where the requests go that name no version; see shares.pxd."""

    def __cinit__(self, shares, *, bint is_sticky=False, sampled=0, Shares after=None):
        """``shares`` are (version, weight): whole numbers, in any unit, those of 0 left out. ``sampled`` of 10,000 are in
        the sample. ``after`` is what these replace: the numbering goes on. ValueError for what makes no shares.
        """
        cdef list wanted = [(version, weight) for version, weight in shares if weight]
        cdef ShareTable *table
        cdef Share *share
        total = sum([weight for _, weight in wanted])
        if not 1 <= len(wanted) <= MAX_SHARES or any([v <= 0 or not 0 < w <= 1 << 32 for v, w in wanted]):
            raise ValueError(f"shares {wanted} must be 1 to {MAX_SHARES} versions with a weight above 0")
        if not 0 <= sampled <= WHOLE_SHARE:
            raise ValueError(f"sampled is {sampled}; it must be 0 to {WHOLE_SHARE}")
        table = self.table = <ShareTable *> calloc(1, sizeof(ShareTable))
        if table == NULL:
            raise MemoryError
        table.references = 1
        table.is_sticky = is_sticky
        table.is_sampled = sampled > 0
        if table.is_sampled:
            table.sample_bound = (sampled << 64) // WHOLE_SHARE - 1
        below = 0
        for version, weight in wanted:
            below += weight
            share = &table.shares[table.n_shares]
            share.version, share.weight = version, weight
            share.bound = min((below << 64) // total, 0xFFFFFFFFFFFFFFFF)
            table.n_shares += 1
        if after is not None:
            table.turns = aiorch_read_turns(&after.table.turns)
            table.keyed_turns = aiorch_read_turns(&after.table.keyed_turns)

    def __dealloc__(self):
        if self.table != NULL:
            release_shares(self.table)

    @property
    def versions(self):
        """Those that requests may go to, as they were given."""
        return tuple([self.table.shares[i].version for i in range(self.table.n_shares)])

    @property
    def turns(self):
        """How many requests were chosen for without a key."""
        return aiorch_read_turns(&self.table.turns)

    def choose(self, bytes key not None=b"", *, bint is_kept=False):
        """The version for the next request, and whether it is in the sample; ``key`` b"": it has none.

        ``is_kept``: by the key, also where shares are not sticky.
        """
        cdef RouteMark mark
        mark.has_key = len(key) > 0
        mark.key = hash_key(<const uint8_t *> <char *> key, <size_t> len(key)) if mark.has_key else 0
        choose_share(self.table, &mark)
        if is_kept and mark.has_key:
            mark.choice.version = find_by_key(self.table, mark.key)
        return mark.choice.version, bool(mark.choice.is_sampled)
