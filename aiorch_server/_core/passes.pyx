"""The table of passes; see passes.pxd for what a pass is, and for how credentials are compared."""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from aiorch_server._core.quota cimport Quota, release_quota, retain_quota
from aiorch_server._core.request cimport (
    aiorch_add_reference,
    now_ns,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from aiorch_server._core.siphash cimport siphash

cdef extern from "<string.h>" nogil:
    void explicit_bzero(void *data, size_t size)

cdef extern from * nogil:
    """
    static inline int aiorch_is_live(const int *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
    static inline void aiorch_end_life(int *flag) { __atomic_store_n(flag, 0, __ATOMIC_RELEASE); }
    """
    bint aiorch_is_live(const int *flag)
    void aiorch_end_life(int *flag)

cdef enum:
    MIN_SLOTS = 64
    PURGED_PER_ADD = 4                  # so that what has expired does not wait for the bounds


# ------------------------------------------------------------------------------------------------------ life of records
cdef void retain_passes(PassTable *table) noexcept nogil:
    aiorch_add_reference(&table.references, 1)


cdef void release_passes(PassTable *table) noexcept nogil:
    if aiorch_add_reference(&table.references, -1) > 0:
        return
    free_chain(clear_table(table))
    pthread_mutex_destroy(&table.lock)
    explicit_bzero(table.key, sizeof(table.key))
    free(table.slots)
    free(table)


cdef void release_pass(Pass *found) noexcept nogil:
    if aiorch_add_reference(&found.references, -1) > 0:
        return
    if found.quota != NULL:
        release_quota(found.quota)
    explicit_bzero(<void *> found.credential.data, found.credential.size)
    free(found)


cdef inline size_t measure(const Pass *entry) noexcept nogil:
    return sizeof(Pass) + entry.credential.size + entry.model.size


cdef void free_chain(Pass *entry) noexcept nogil:
    """Gives back the table's references to passes that left it, linked by `newer`."""
    cdef Pass *following
    while entry != NULL:
        following = entry.newer
        release_pass(entry)
        entry = following


# ------------------------------------------------------------------------------------------------------------ comparing
cdef uint64_t hash_claim(const PassTable *table, CredentialKind kind, const Slice *credential,
                         const Slice *model) noexcept nogil:
    cdef uint64_t of_credential = siphash(
        table.key[0], table.key[1] ^ <uint64_t> kind, credential.data, credential.size)
    return siphash(table.key[0] ^ of_credential, table.key[1], model.data, model.size)


cdef inline bint equals(const Slice *a, const Slice *b) noexcept nogil:
    return a.size == b.size and memcmp(a.data, b.data, a.size) == 0


cdef bint equals_in_constant_time(const Slice *a, const Slice *b) noexcept nogil:
    """In a time that depends on the sizes alone."""
    cdef uint64_t difference = 0
    cdef uint64_t x[4]
    cdef uint64_t y[4]
    cdef size_t at = 0
    if a.size != b.size:
        return False
    while at + sizeof(x) <= a.size:
        memcpy(x, a.data + at, sizeof(x))
        memcpy(y, b.data + at, sizeof(y))
        difference |= (x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3])
        at += sizeof(x)
    while at < a.size:
        difference |= a.data[at] ^ b.data[at]
        at += 1
    return difference == 0


# ------------------------------------------------------------------------------------------------- the table, under lock
cdef inline Pass **find_slot(PassTable *table, uint64_t hash) noexcept nogil:
    return &table.slots[hash & (table.n_slots - 1)]


cdef Pass *find_entry(PassTable *table, uint64_t hash, CredentialKind kind, const Slice *credential,
                      const Slice *model) noexcept nogil:
    cdef Pass *entry = find_slot(table, hash)[0]
    while entry != NULL:
        if (entry.hash == hash and entry.kind == kind and equals(&entry.model, model)
                and equals(&entry.credential, credential)):
            return entry
        entry = entry.next
    return NULL


cdef void take_out(PassTable *table, Pass *entry) noexcept nogil:
    """Ends its life; the table's reference is the caller's now."""
    cdef Pass **link = find_slot(table, entry.hash)
    while link[0] != entry:
        link = &link[0].next
    link[0] = entry.next
    if entry.older != NULL:
        entry.older.newer = entry.newer
    else:
        table.oldest = entry.newer
    if entry.newer != NULL:
        entry.newer.older = entry.older
    else:
        table.newest = entry.older
    table.n_entries -= 1
    table.n_bytes -= measure(entry)
    entry.next = entry.older = entry.newer = NULL
    aiorch_end_life(&entry.is_live)


cdef void put_in(PassTable *table, Pass *entry) noexcept nogil:
    cdef Pass **slot = find_slot(table, entry.hash)
    entry.next = slot[0]
    slot[0] = entry
    entry.older = table.newest
    if table.newest != NULL:
        table.newest.newer = entry
    else:
        table.oldest = entry
    table.newest = entry
    table.n_entries += 1
    table.n_bytes += measure(entry)


cdef Pass *make_room(PassTable *table, size_t size, int64_t now) noexcept nogil:
    """Throws out what is too much, and of the oldest what has expired; a chain linked by `newer`."""
    cdef Pass *chain = NULL
    cdef Pass *entry
    cdef int n_purged = 0
    while table.oldest != NULL:
        entry = table.oldest
        if entry.expires_ns <= now and n_purged < PURGED_PER_ADD:
            n_purged += 1
        elif table.n_entries >= table.max_entries or table.n_bytes + size > table.max_bytes:
            table.evicted += 1
        else:
            break
        take_out(table, entry)
        entry.newer = chain
        chain = entry
    return chain


cdef Pass *clear_table(PassTable *table) noexcept nogil:
    """Everything that was in it, as a chain linked by `newer`."""
    cdef Pass *chain = NULL
    cdef Pass *entry
    while table.oldest != NULL:
        entry = table.oldest
        take_out(table, entry)
        entry.newer = chain
        chain = entry
    return chain


# ------------------------------------------------------------------------------------------------------------- lookups
cdef inline void forget(const Claim *claim) noexcept nogil:
    if claim.last[0] != NULL:
        release_pass(claim.last[0])
        claim.last[0] = NULL


cdef bint is_last(const Claim *claim, int64_t now_ns) noexcept nogil:
    """Whether the connection's last hit was with this credential and holds; one that is over is let go of."""
    cdef Pass *last = claim.last[0]
    if last == NULL:
        return False
    if not aiorch_is_live(&last.is_live) or now_ns >= last.expires_ns:
        forget(claim)
        return False
    return last.kind == claim.kind and equals_in_constant_time(&last.credential, &claim.credential)


cdef bint is_known(const Claim *claim, int64_t now_ns) noexcept nogil:
    return claim.kind != CREDENTIAL_NONE and is_last(claim, now_ns)


cdef const Pass *find_pass(const Claim *claim, const Slice *model, int64_t now_ns) noexcept nogil:
    cdef PassTable *table = claim.table
    cdef Pass *found
    cdef uint64_t hash
    if claim.kind == CREDENTIAL_NONE:
        return NULL
    if is_last(claim, now_ns) and equals(&claim.last[0].model, model):
        return claim.last[0]
    hash = hash_claim(table, claim.kind, &claim.credential, model)
    pthread_mutex_lock(&table.lock)
    found = find_entry(table, hash, claim.kind, &claim.credential, model)
    if found != NULL and now_ns >= found.expires_ns:
        found = NULL
    if found != NULL:
        aiorch_add_reference(&found.references, 1)
    pthread_mutex_unlock(&table.lock)
    if found != NULL:
        forget(claim)
        claim.last[0] = found
    return found


# ---------------------------------------------------------------------------------------------------------- for Python
def hash_credential(bytes key not None, bytes data not None):
    """SipHash-2-4 as the table uses it; ``key`` has 16 bytes. For tests."""
    cdef uint64_t words[2]
    if len(key) != sizeof(words):
        raise ValueError(f"the key has {len(key)} bytes; expected 16")
    memcpy(words, PyBytes_AS_STRING(key), sizeof(words))
    return siphash(words[0], words[1], <const uint8_t *> PyBytes_AS_STRING(data), <size_t> PyBytes_GET_SIZE(data))


cdef Slice slice_of(bytes text):
    cdef Slice slice
    slice.data, slice.size = <const uint8_t *> PyBytes_AS_STRING(text), <size_t> PyBytes_GET_SIZE(text)
    return slice


cdef class Passes:
    """Which credentials may call which model, as decided before: what compiled doors let through.

    At most ``max_entries`` are kept, of ``max_bytes`` together; the oldest go first. ValueError for bounds below 1. Any
    thread.
    """

    def __cinit__(self, *, size_t max_entries=16384, size_t max_bytes=64 << 20):
        cdef PassTable *table
        cdef bytes key = os.urandom(16)
        if max_entries < 1 or max_bytes < 1:
            raise ValueError("a table of passes has room for 1 entry and 1 byte at least")
        self.table = table = <PassTable *> calloc(1, sizeof(PassTable))
        if table == NULL:
            raise MemoryError
        table.references = 1
        pthread_mutex_init(&table.lock, NULL)
        memcpy(table.key, PyBytes_AS_STRING(key), sizeof(table.key))
        table.max_entries, table.max_bytes = max_entries, max_bytes
        table.n_slots = MIN_SLOTS
        while table.n_slots < max_entries and table.n_slots < 1 << 24:
            table.n_slots *= 2
        table.slots = <Pass **> calloc(table.n_slots, sizeof(Pass *))
        if table.slots == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.table != NULL:
            release_passes(self.table)

    @property
    def generation(self):
        """How often it was cleared: read it before deciding what ``add`` is told."""
        cdef uint64_t generation
        pthread_mutex_lock(&self.table.lock)
        generation = self.table.generation
        pthread_mutex_unlock(&self.table.lock)
        return generation

    @property
    def entries(self):
        """How many passes there are; no ``len``, so that an empty table is not taken for none at all."""
        return self.table.n_entries

    @property
    def used_bytes(self):
        """What the passes take, with credentials and names."""
        return self.table.n_bytes

    @property
    def evicted(self):
        """Passes thrown out for the bounds."""
        return self.table.evicted

    def add(self, bytes credential not None, str model not None, *, int64_t expires_ns, uint64_t generation,
            Quota quota=None, uint64_t tenant=0, double weight=1.0, bint is_certificate=False):
        """Lets calls with ``credential`` to ``model`` through until ``expires_ns`` on the monotonic clock.

        ``credential`` is the whole value of `authorization`, or a certificate in DER; ``quota`` counts for them, and
        ``tenant`` is the number by which queues know whose they are, 0 for nobody's, with the ``weight`` of its share.
        Replaces what was there for both. False, and nothing is added, where the table was cleared since it had
        ``generation`` (the decision may be outdated), for an empty credential, one that has expired, and one that is
        larger than the whole table may be.
        """
        cdef PassTable *table = self.table
        cdef bytes name = model.encode()
        cdef Slice shown = slice_of(credential)
        cdef Slice asked = slice_of(name)
        cdef Pass *entry
        cdef Pass *former
        cdef Pass *retired = NULL
        cdef int64_t now = now_ns()
        cdef bint is_added
        if shown.size == 0 or expires_ns <= now or sizeof(Pass) + shown.size + asked.size > table.max_bytes:
            return False
        entry = <Pass *> malloc(sizeof(Pass) + shown.size + asked.size)
        if entry == NULL:
            raise MemoryError
        entry.references = entry.is_live = 1
        entry.kind = CREDENTIAL_CERTIFICATE if is_certificate else CREDENTIAL_HEADER
        entry.credential.data, entry.credential.size = <uint8_t *> (entry + 1), shown.size
        entry.model.data, entry.model.size = entry.credential.data + shown.size, asked.size
        memcpy(<void *> entry.credential.data, shown.data, shown.size)
        memcpy(<void *> entry.model.data, asked.data, asked.size)
        entry.expires_ns = expires_ns
        entry.quota = NULL
        entry.tenant, entry.weight = tenant, weight
        if quota is not None:
            entry.quota = quota.state
            retain_quota(entry.quota)
        entry.next = entry.older = entry.newer = NULL
        entry.hash = hash_claim(table, entry.kind, &entry.credential, &entry.model)
        pthread_mutex_lock(&table.lock)
        is_added = table.generation == generation
        if is_added:
            former = find_entry(table, entry.hash, entry.kind, &entry.credential, &entry.model)
            if former != NULL:
                take_out(table, former)
            retired = make_room(table, measure(entry), now)
            if former != NULL:
                former.newer = retired
                retired = former
            put_in(table, entry)
        pthread_mutex_unlock(&table.lock)
        free_chain(retired)
        if not is_added:
            release_pass(entry)
        return is_added

    def holds(self, bytes credential not None, str model not None, int64_t now_ns, *, bint is_certificate=False):
        """Whether a call with ``credential`` to ``model`` would be let through at that time."""
        cdef bytes name = model.encode()
        cdef Slice asked = slice_of(name)
        cdef Pass *last = NULL
        cdef Claim claim
        claim.table, claim.last, claim.credential = self.table, &last, slice_of(credential)
        claim.kind = CREDENTIAL_CERTIFICATE if is_certificate else CREDENTIAL_HEADER
        if find_pass(&claim, &asked, now_ns) == NULL:
            return False
        forget(&claim)
        return True

    def clear(self):
        """Nobody passes any more: all are asked again. Holds for calls whose message is not complete yet."""
        cdef PassTable *table = self.table
        cdef Pass *chain
        with nogil:
            pthread_mutex_lock(&table.lock)
            table.generation += 1
            chain = clear_table(table)
            pthread_mutex_unlock(&table.lock)
            free_chain(chain)
