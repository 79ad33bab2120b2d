"""Memory for messages and tensors; see buffers.pxd for the contract."""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

cdef extern from * nogil:
    """
    #include <pthread.h>

    #ifdef __has_feature    /* clang's word for it */
    #if __has_feature(address_sanitizer)
    #define __SANITIZE_ADDRESS__ 1
    #endif
    #endif

    #ifdef __SANITIZE_ADDRESS__
    #define AIORCH_HAS_POOL 0
    #else
    #define AIORCH_HAS_POOL 1
    #endif

    static pthread_mutex_t aiorch_pool_lock = PTHREAD_MUTEX_INITIALIZER;
    static inline void aiorch_lock_pool(void) { pthread_mutex_lock(&aiorch_pool_lock); }
    static inline void aiorch_unlock_pool(void) { pthread_mutex_unlock(&aiorch_pool_lock); }

    static inline int aiorch_count_references(int *count, int by) { return __atomic_add_fetch(count, by, __ATOMIC_ACQ_REL); }

    /* a cache line for each: the places belong to different threads */
    static struct { unsigned long bytes; char rest[56]; } aiorch_copied[8];
    static inline void aiorch_add_copied(int place, size_t size)
    {
        __atomic_fetch_add(&aiorch_copied[place].bytes, size, __ATOMIC_RELAXED);
    }
    static inline unsigned long aiorch_read_copied(int place)
    {
        return __atomic_load_n(&aiorch_copied[place].bytes, __ATOMIC_RELAXED);
    }
    """
    const bint AIORCH_HAS_POOL
    void aiorch_lock_pool()
    void aiorch_unlock_pool()
    int aiorch_count_references(int *count, int by)
    void aiorch_add_copied(int place, size_t size)
    unsigned long aiorch_read_copied(int place)


cdef enum:
    SMALL = -1                  # less than POOLED_FROM_BYTES, neither aligned nor pooled
    HUGE = -2                   # too big for the pool
    N_CLASSES = 33              # four per doubling, from POOLED_FROM_BYTES to POOLED_TO_BYTES


cdef struct Block:              # where the memory begins; the data follows, at an odd place if its tensor wants that
    Block *next                 # in the pool
    size_t capacity             # behind the record and its gap, of the least aligned
    int references
    int size_class
    bint is_slab
    size_t gap                  # the last bytes in front of the data hold its distance from here


cdef Block *_pool[N_CLASSES]
cdef uint64_t _last_use[N_CLASSES]  # the round in which one was taken from there, or found none
cdef uint64_t _round = 0
cdef size_t _pooled_bytes = 0
cdef size_t _slab_bytes = 0         # both guarded by the lock


cdef inline size_t _class_bytes(int size_class) noexcept nogil:
    return (<size_t> POOLED_FROM_BYTES << (size_class >> 2)) // 4 * <size_t> (4 + (size_class & 3))


cdef inline Block *_find_block(uint8_t *buffer) noexcept nogil:
    cdef uint32_t distance
    memcpy(&distance, buffer - sizeof(distance), sizeof(distance))
    return <Block *> (buffer - distance)


cdef uint8_t *_place(Block *block, size_t align_at) noexcept nogil:
    """Where the data begins; writes down how to find the record from there."""
    cdef size_t at = <size_t> (block + 1)
    cdef uint32_t distance
    if block.size_class != SMALL:
        at += (ALIGNMENT_BYTES - (at + align_at) % ALIGNMENT_BYTES) % ALIGNMENT_BYTES
    distance = <uint32_t> (at - <size_t> block)
    memcpy(<uint8_t *> at - sizeof(distance), &distance, sizeof(distance))
    return <uint8_t *> at


cdef Block *_take_pooled(int size_class) noexcept nogil:
    global _pooled_bytes, _round
    cdef Block *block
    aiorch_lock_pool()
    _round += 1
    _last_use[size_class] = _round
    block = _pool[size_class]
    if block != NULL:
        _pool[size_class] = block.next
        _pooled_bytes -= block.capacity
    aiorch_unlock_pool()
    return block


cdef bint _keep_pooled(Block *block) noexcept nogil:
    """Puts memory aside for reuse; False where enough is waiting. Sizes that nobody wants any more make room."""
    global _pooled_bytes
    cdef bint has_room
    cdef Block *stale
    cdef Block *stales = NULL
    cdef int k, oldest
    aiorch_lock_pool()
    while _pooled_bytes + block.capacity > POOL_BYTES:
        oldest = block.size_class
        for k in range(N_CLASSES):
            if _pool[k] != NULL and _last_use[k] < _last_use[oldest]:
                oldest = k
        if oldest == block.size_class:
            break
        stale = _pool[oldest]
        _pool[oldest] = stale.next
        _pooled_bytes -= stale.capacity
        stale.next, stales = stales, stale
    has_room = _pooled_bytes + block.capacity <= POOL_BYTES
    if has_room:
        block.next = _pool[block.size_class]
        _pool[block.size_class] = block
        _pooled_bytes += block.capacity
    aiorch_unlock_pool()
    while stales != NULL:
        stale = stales
        stales = stale.next
        free(stale)
    return has_room


cdef uint8_t *new_buffer(size_t size, size_t align_at) noexcept nogil:
    cdef Block *block = NULL
    cdef size_t capacity = size
    cdef int size_class = SMALL
    if size >= POOLED_FROM_BYTES:
        size_class = HUGE
        if size <= POOLED_TO_BYTES and AIORCH_HAS_POOL:
            size_class = 0
            while _class_bytes(size_class) < size:
                size_class += 1
            capacity = _class_bytes(size_class)
            block = _take_pooled(size_class)
    if block == NULL:
        block = <Block *> malloc(sizeof(Block) + (0 if size_class == SMALL else ALIGNMENT_BYTES) + capacity)
        if block == NULL:
            return NULL
        block.capacity, block.size_class = capacity, size_class
    block.references, block.is_slab = 1, False
    return _place(block, align_at)


cdef bint _count_slab(size_t size, bint is_new) noexcept nogil:
    global _slab_bytes
    cdef bint has_room = True
    aiorch_lock_pool()
    if not is_new:
        _slab_bytes -= size
    else:
        has_room = _slab_bytes + size <= MAX_SLAB_BYTES
        if has_room:
            _slab_bytes += size
    aiorch_unlock_pool()
    return has_room


cdef uint8_t *new_slab_buffer(size_t size) noexcept nogil:
    cdef uint8_t *buffer = new_buffer(size, 0) if size >= POOLED_FROM_BYTES else NULL
    if buffer != NULL:
        if not _count_slab(_find_block(buffer).capacity, True):
            drop_buffer(buffer)
            return NULL
        _find_block(buffer).is_slab = True
    return buffer


cdef void hold_buffer(uint8_t *buffer) noexcept nogil:
    aiorch_count_references(&_find_block(buffer).references, 1)


cdef int count_references(uint8_t *buffer) noexcept nogil:
    return aiorch_count_references(&_find_block(buffer).references, 0)


cdef void drop_buffer(uint8_t *buffer) noexcept nogil:
    cdef Block *block
    if buffer == NULL:
        return
    block = _find_block(buffer)
    if aiorch_count_references(&block.references, -1) > 0:
        return
    if block.is_slab:
        _count_slab(block.capacity, False)
    if block.size_class < 0 or not _keep_pooled(block):
        free(block)


cdef uint8_t *grow_buffer(uint8_t *buffer, size_t kept, size_t size, size_t align_at) noexcept nogil:
    cdef Block *block
    cdef Block *moved
    cdef uint8_t *grown
    cdef size_t distance
    if buffer != NULL:
        block = _find_block(buffer)
        if block.size_class >= 0 and size <= block.capacity:
            return buffer
        distance = <size_t> (buffer - <uint8_t *> block)
        if block.size_class == HUGE and aiorch_count_references(&block.references, 0) == 1:
            # the kernel moves pages instead of bytes
            moved = <Block *> realloc(block, distance + size)
            if moved == NULL:
                return NULL
            moved.capacity = size
            return <uint8_t *> moved + distance
    grown = new_buffer(size, align_at)
    if grown != NULL and buffer != NULL:
        memcpy(grown, buffer, kept)
        aiorch_add_copied(COPY_RECEIVED, kept)
        drop_buffer(buffer)
    return grown


cdef size_t count_pooled() noexcept nogil:
    cdef size_t size
    aiorch_lock_pool()
    size = _pooled_bytes
    aiorch_unlock_pool()
    return size


cdef void count_copied(CopyPlace place, size_t size) noexcept nogil:
    aiorch_add_copied(place, size)


cdef class HeldBuffer:
    """Bytes of a message or of a batch; the arrays over it keep it alive."""

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, <Py_ssize_t> self.size, 0, flags)

    def __dealloc__(self):
        drop_buffer(self.buffer)


cdef HeldBuffer hold_for_python(uint8_t *buffer, uint8_t *data, size_t size):
    cdef HeldBuffer held = HeldBuffer.__new__(HeldBuffer)
    hold_buffer(buffer)
    held.buffer, held.data, held.size = buffer, data, size
    return held


def read_copied_bytes():
    """Bytes of messages that this process has copied in user space since its start, by place."""
    return {
        "received": aiorch_read_copied(COPY_RECEIVED),
        "gathered": aiorch_read_copied(COPY_GATHERED),
        "encoded": aiorch_read_copied(COPY_ENCODED),
        "sent": aiorch_read_copied(COPY_SENT),
    }


def read_slab_bytes():
    """Bytes of buffers that hold tensors of several requests."""
    cdef size_t size
    aiorch_lock_pool()
    size = _slab_bytes
    aiorch_unlock_pool()
    return size


def read_pooled_bytes():
    """Bytes of big buffers that wait for reuse."""
    return count_pooled()
