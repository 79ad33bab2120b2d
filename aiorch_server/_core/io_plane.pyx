"""An I/O thread's side of the calls that run on the asyncio plane; see io_plane.pxd."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t

from aiorch_server._core.crossing cimport *
from aiorch_server._core.h2_answer cimport finish_stream, revoke_stream, send_head, send_message
from aiorch_server._core.h2_request cimport take_event, take_message
from aiorch_server._core.h2_stream cimport *
from aiorch_server._core.io_state cimport IoConnection, IoState, mark_dirty
from aiorch_server._core.transport cimport retain_identity

cdef enum:
    STATUS_RESOURCE_EXHAUSTED = 8
    LINK_BYTES = 1024                   # what a call costs the asyncio plane beside its messages


cdef void post(IoState *io, Event *event) noexcept nogil:
    event.next = NULL
    if io.events_tail != NULL:
        io.events_tail.next = event
    else:
        io.events_head = event
    io.events_tail = event


cdef Link *open_link(IoConnection *connection, Stream *stream) noexcept nogil:
    cdef Link *link = new_link(stream.metadata, stream.metadata_size)
    if link == NULL:
        return NULL
    link.deadline_ns, link.encoding, link.accepted = stream.deadline.due_ns, <int> stream.encoding, stream.accepted
    link.peer, link.peer_size = connection.peer, connection.peer_size
    if connection.transport != NULL:
        link.identity = retain_identity(connection.transport.identity)
    link.stream, link.connection = stream, connection
    link.older = connection.links
    if link.older != NULL:
        link.older.newer = link
    connection.links = link
    stream.owner = link
    return link


cdef inline size_t *count_held(IoState *io, IoConnection *connection) noexcept nogil:
    """Where the bytes are counted that the asyncio plane holds of calls that are over."""
    return &io.lost_bytes if connection == NULL else &connection.orphan_bytes


cdef void end_link(IoState *io, Link *link) noexcept nogil:
    """The asyncio plane has ended the call."""
    cdef IoConnection *connection = <IoConnection *> link.connection
    if link.is_orphan:
        count_held(io, connection)[0] -= link.handed_bytes + LINK_BYTES + link.metadata_size
    if connection != NULL:
        if link.newer != NULL:
            link.newer.older = link.older
        else:
            connection.links = link.older
        if link.older != NULL:
            link.older.newer = link.newer
        link.connection = NULL
    release_link(link)


cdef void tell_over(IoConnection *connection, Stream *stream, Link *link) noexcept nogil:
    link.stream, link.last_handed = NULL, NULL
    stream.owner = NULL
    release_stream(stream)
    link.is_orphan = True
    connection.orphan_bytes += link.handed_bytes + LINK_BYTES + link.metadata_size
    link.over.link, link.over.bits = link, EVENT_OVER
    retain_link(link)
    post(connection.io, &link.over)


cdef int tell_messages(IoConnection *connection, Stream *stream, Link *link, uint32_t bits) noexcept nogil:
    """Hands over the messages that were not told yet, with the other bits around them. -1: no memory.

    The record of a message stays in the stream's inbox, and with it on the books, until COMMAND_READ.
    """
    cdef Message *message = link.last_handed.next if link.last_handed != NULL else stream.inbox_head
    cdef uint32_t first_bits = bits & EVENT_CALL
    cdef uint32_t last_bits = bits & (EVENT_HALF_CLOSE | EVENT_WRITABLE)
    cdef Event *event = NULL
    while message != NULL:
        event = new_event(link, first_bits | EVENT_MESSAGE)
        if event == NULL:
            return -1
        event.data, event.size, event.is_compressed = message.data, message.size, message.is_compressed
        message.data = NULL
        link.last_handed = message
        link.handed_bytes += message.size + LISTED_MESSAGE_BYTES
        first_bits = 0
        post(connection.io, event)
        message = message.next
    if event == NULL and first_bits | last_bits:
        event = new_event(link, first_bits)
        if event == NULL:
            return -1
        post(connection.io, event)
    if event != NULL:
        event.bits |= last_bits
    return 0


cdef int tell_events(IoConnection *connection) noexcept nogil:
    """Tells the asyncio plane what happened to its calls. -1: no memory, some were answered instead."""
    cdef Stream *stream
    cdef Link *link
    cdef uint32_t bits = 0
    cdef int result = 0
    while True:
        stream = take_event(connection.session, &bits)
        if stream == NULL:
            return result
        link = <Link *> stream.owner
        if bits & EVENT_OVER:
            tell_over(connection, stream, link)
            continue
        if link == NULL:
            link = open_link(connection, stream)
        if bits & EVENT_WRITABLE and link != NULL:
            aiorch_store_size(&link.sent_bytes, link.applied_bytes - stream.unsent_bytes)
        if link == NULL or tell_messages(connection, stream, link, bits) < 0:
            revoke_stream(stream, STATUS_RESOURCE_EXHAUSTED, b"Out of memory")
            result = -1


cdef void carry_out(IoState *io, Link *link, Command *command) noexcept nogil:
    """One command to a call; the stream may be over, the connection gone."""
    cdef IoConnection *connection = <IoConnection *> link.connection
    cdef Stream *stream = link.stream
    cdef Message *message
    if connection != NULL:
        mark_dirty(connection)
    if command.kind == COMMAND_READ:
        link.handed_bytes -= command.size + LISTED_MESSAGE_BYTES
        if link.is_orphan:
            count_held(io, connection)[0] -= command.size + LISTED_MESSAGE_BYTES
        if stream != NULL:
            message = take_message(stream)
            if message != NULL:
                if message == link.last_handed:
                    link.last_handed = NULL
                free_message(message)
    elif command.kind == COMMAND_HEAD:
        if stream != NULL:
            send_head(stream, command.data, command.size)
    elif command.kind == COMMAND_MESSAGE:
        if stream != NULL:
            link.applied_bytes += command.size
            send_message(stream, command.data, command.size)
            command.data = NULL
    elif command.kind == COMMAND_WANT_WRITABLE:
        if stream != NULL and takes_answers(stream):
            if stream.unsent_bytes <= stream.group.limits.high_water_bytes // 2:
                push_event(stream, EVENT_WRITABLE)
            else:
                stream.wants_writable = True
    elif command.kind == COMMAND_FINISH or command.kind == COMMAND_RELEASE:
        if stream != NULL:
            link.stream = NULL
            finish_stream(stream, command.code, command.data, command.size, command.more, command.more_size)
            detach_owner(stream)
        end_link(io, link)
