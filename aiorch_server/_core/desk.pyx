"""The way between sessions and queues; see desk.pxd."""

from libc.stdint cimport uint8_t
from libc.string cimport strlen

from aiorch_server._core.admission cimport cancel_request
from aiorch_server._core.h2_answer cimport answer_stream, fail_stream, finish_stream
from aiorch_server._core.h2_request cimport make_slow, take_ready
from aiorch_server._core.h2_stream cimport keep_metadata
from aiorch_server._core.passes cimport CREDENTIAL_CERTIFICATE, CREDENTIAL_HEADER, CREDENTIAL_NONE
from aiorch_server._core.request cimport free_request
from aiorch_server._core.retry_hint cimport HINT_BYTES, pack_hint
from aiorch_server._core.routes cimport DISPATCHED, dispatch
from aiorch_server._core.shares cimport Choice

cdef enum:
    STATUS_RESOURCE_EXHAUSTED = 8
    STATUS_INTERNAL = 13


cdef void abandon_request(Stream *stream) noexcept nogil:
    cdef Request *request = <Request *> stream.request
    stream.request = NULL
    if cancel_request(request):
        stream.group.in_flight -= 1
        free_request(request)
    else:
        request.owner = NULL            # it comes through the sink and is freed there


cdef void hand_on(Stream *stream) noexcept nogil:
    """Makes a slow call of what was declined; with the version that was chosen for it, which holds there too."""
    if stream.mark.choice.version == 0 or keep_metadata(
            stream, <const uint8_t *> b":choice", 7, <const uint8_t *> &stream.mark.choice, sizeof(Choice)) == 0:
        make_slow(stream)
    else:
        fail_stream(stream, STATUS_RESOURCE_EXHAUSTED, <const uint8_t *> b"Out of memory", 13)


cdef void read_claim(Stream *stream, Claim *claim) noexcept nogil:
    cdef Connection *connection = stream.connection
    claim.table, claim.last, claim.kind = stream.group.passes, &connection.last_pass, CREDENTIAL_NONE
    if stream.n_credentials == 1:
        claim.kind = CREDENTIAL_HEADER
        claim.credential.data = stream.metadata + stream.credential_at
        claim.credential.size = stream.credential_size
    elif stream.n_credentials == 0 and connection.identity != NULL and connection.identity.certificate != NULL:
        claim.kind = CREDENTIAL_CERTIFICATE
        claim.credential.data = connection.identity.certificate
        claim.credential.size = connection.identity.certificate_size


cdef void dispatch_ready(Connection *connection, RouteReader *reader, CompletionSink *sink) noexcept nogil:
    cdef Request *request = NULL
    cdef Stream *stream = take_ready(connection)
    cdef Claim claim
    cdef Claim *shown = NULL
    if connection.group.passes != NULL:
        shown = &claim
    while stream != NULL:
        if shown != NULL:
            read_claim(stream, shown)
        if (stream.message != NULL and sink != NULL and dispatch(
                reader, stream.message, stream.message_size, &stream.rest, stream.received_ns, stream.deadline.due_ns,
                &stream.parent, &stream.mark, shown, sink, stream, &request) == DISPATCHED):
            stream.message = stream.rest.buffer = NULL
            stream.request = request
            connection.group.in_flight += 1
        else:
            hand_on(stream)
        stream = take_ready(connection)


cdef void push_back(Stream *stream, const Request *request) noexcept nogil:
    """Refuses with the time after which to retry."""
    cdef uint8_t packed[HINT_BYTES]
    cdef const char *text = b""
    cdef size_t size
    if request.error != NULL:
        text = request.error
    size = strlen(text)
    finish_stream(stream, request.status, <const uint8_t *> text, size, packed,
                  pack_hint(packed, request.status, text, size, request.retry_after_ns))


cdef Connection *settle_request(Group *group, Request *request) noexcept nogil:
    cdef Stream *stream = <Stream *> request.owner
    cdef Connection *connection = NULL
    group.in_flight -= 1
    if stream != NULL:
        connection = stream.connection
        stream.request = NULL
        if request.retry_after_ns:
            push_back(stream, request)
        elif request.status != 0:
            fail_stream(stream, request.status, <const uint8_t *> request.error,
                        strlen(request.error) if request.error != NULL else 0)
        elif request.response == NULL:
            fail_stream(stream, STATUS_INTERNAL, NULL, 0)
        else:
            answer_stream(stream, request.response, request.response_size, request.lent)
            request.response = NULL     # both are the stream's now
            request.lent = NULL
    free_request(request)
    return connection
