"""The way between an I/O thread and the asyncio plane; see crossing.pxd."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from aiorch_server._core.buffers cimport drop_buffer
from aiorch_server._core.request cimport (
    aiorch_add_reference,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from aiorch_server._core.transport cimport release_identity

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    Py_ssize_t read(int fd, void *buffer, size_t size)
    Py_ssize_t write(int fd, const void *buffer, size_t size)
    int close(int fd)


cdef Crossing *new_crossing() noexcept nogil:
    cdef Crossing *crossing = <Crossing *> calloc(1, sizeof(Crossing))
    if crossing == NULL:
        return NULL
    crossing.events_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    crossing.commands_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    if crossing.events_fd < 0 or crossing.commands_fd < 0:
        close_descriptors(crossing)
        free(crossing)
        return NULL
    pthread_mutex_init(&crossing.lock, NULL)
    return crossing


cdef void close_descriptors(Crossing *crossing) noexcept nogil:
    if crossing.events_fd >= 0:
        close(crossing.events_fd)
    if crossing.commands_fd >= 0:
        close(crossing.commands_fd)


cdef void free_crossing(Crossing *crossing) noexcept nogil:
    cdef Event *event = crossing.events_head
    cdef Event *following
    while event != NULL:
        following = event.next
        free_event(event)
        event = following
    close_commands(crossing)
    close_descriptors(crossing)
    pthread_mutex_destroy(&crossing.lock)
    free(crossing)


cdef Link *new_link(const uint8_t *metadata, size_t metadata_size) noexcept nogil:
    cdef Link *link = <Link *> calloc(1, sizeof(Link))
    if link == NULL:
        return NULL
    link.metadata = <uint8_t *> malloc(metadata_size + 1)
    if link.metadata == NULL:
        free(link)
        return NULL
    memcpy(link.metadata, metadata, metadata_size)
    link.metadata_size = metadata_size
    link.references = 1
    return link


cdef void retain_link(Link *link) noexcept nogil:
    aiorch_add_reference(&link.references, 1)


cdef void release_link(Link *link) noexcept nogil:
    if aiorch_add_reference(&link.references, -1) == 0:
        release_identity(link.identity)
        free(link.metadata)
        free(link)


cdef Event *new_event(Link *link, uint32_t bits) noexcept nogil:
    cdef Event *event = <Event *> calloc(1, sizeof(Event))
    if event != NULL:
        event.link, event.bits = link, bits
        retain_link(link)
    return event


cdef Command *new_command(Link *link, CommandKind kind) noexcept nogil:
    cdef Command *command = <Command *> calloc(1, sizeof(Command))
    if command != NULL:
        command.link, command.kind = link, kind
        if link != NULL:
            retain_link(link)
    return command


cdef void free_event(Event *event) noexcept nogil:
    cdef Link *link = event.link
    drop_buffer(event.data)
    event.data = NULL
    if link == NULL:
        return              # the thread's own, embedded in its state
    if event != &link.over:
        free(event)
    release_link(link)


cdef void free_command(Command *command) noexcept nogil:
    cdef Link *link = command.link
    drop_buffer(command.data)
    drop_buffer(command.more)
    command.data = command.more = NULL
    if link == NULL or command != &link.end:
        free(command)
    if link != NULL:
        release_link(link)


cdef void put_events(Crossing *crossing, Event *first, Event *last) noexcept nogil:
    cdef bint must_wake
    cdef uint64_t one = 1
    last.next = NULL
    pthread_mutex_lock(&crossing.lock)
    if crossing.events_tail == NULL:
        crossing.events_head = first
    else:
        crossing.events_tail.next = first
    crossing.events_tail = last
    must_wake = not crossing.are_events_signalled
    crossing.are_events_signalled = True
    pthread_mutex_unlock(&crossing.lock)
    if must_wake:
        write(crossing.events_fd, &one, sizeof(one))


cdef Event *take_events(Crossing *crossing) noexcept nogil:
    cdef Event *chain
    cdef uint64_t count
    pthread_mutex_lock(&crossing.lock)
    # Inside the lock and in any case: who raised the flag may write after this, and that wake-up finds nothing, once.
    read(crossing.events_fd, &count, sizeof(count))
    crossing.are_events_signalled = False
    chain = crossing.events_head
    crossing.events_head = crossing.events_tail = NULL
    pthread_mutex_unlock(&crossing.lock)
    return chain


cdef void discard_command(Command *command) noexcept nogil:
    cdef Link *link = command.link
    cdef bint is_end = command.kind == COMMAND_FINISH or command.kind == COMMAND_RELEASE
    free_command(command)
    if is_end:
        release_link(link)      # the I/O thread's, which is gone


cdef void put_command(Crossing *crossing, Command *command) noexcept nogil:
    cdef bint must_wake = False
    cdef bint is_closed
    cdef uint64_t one = 1
    command.next = NULL
    pthread_mutex_lock(&crossing.lock)
    is_closed = crossing.is_closed
    if not is_closed:
        if crossing.commands_tail == NULL:
            crossing.commands_head = command
        else:
            crossing.commands_tail.next = command
        crossing.commands_tail = command
        must_wake = not crossing.are_commands_signalled
        crossing.are_commands_signalled = True
    pthread_mutex_unlock(&crossing.lock)
    if is_closed:
        discard_command(command)
    elif must_wake:
        write(crossing.commands_fd, &one, sizeof(one))


cdef Command *take_commands(Crossing *crossing) noexcept nogil:
    cdef Command *chain
    cdef uint64_t count
    pthread_mutex_lock(&crossing.lock)
    read(crossing.commands_fd, &count, sizeof(count))
    crossing.are_commands_signalled = False
    chain = crossing.commands_head
    crossing.commands_head = crossing.commands_tail = NULL
    pthread_mutex_unlock(&crossing.lock)
    return chain


cdef void close_commands(Crossing *crossing) noexcept nogil:
    cdef Command *command
    cdef Command *following
    pthread_mutex_lock(&crossing.lock)
    crossing.is_closed = True
    command = crossing.commands_head
    crossing.commands_head = crossing.commands_tail = NULL
    pthread_mutex_unlock(&crossing.lock)
    while command != NULL:
        following = command.next
        discard_command(command)
        command = following
