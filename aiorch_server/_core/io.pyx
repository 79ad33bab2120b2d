"""The asyncio side of an I/O thread; see io.pxd for who owns what."""

import os
import socket
import threading
import urllib.parse
from collections import deque

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from aiorch_server._core.buffers cimport drop_buffer, new_buffer
from aiorch_server._core.crossing cimport *
from aiorch_server._core.h2 cimport set_passes, set_rules
from aiorch_server._core.h2_ledger cimport ServerLedger
from aiorch_server._core.h2_life cimport ConnectionRules
from aiorch_server._core.h2_stream cimport (
    EVENT_CALL,
    EVENT_HALF_CLOSE,
    EVENT_MESSAGE,
    EVENT_OVER,
    EVENT_WRITABLE,
    SessionLimits,
)
from aiorch_server._core.io_loop cimport add_listener, close_listeners, free_io, new_io, run_loop, settle_late
from aiorch_server._core.passes cimport Passes
from aiorch_server._core.transport cimport PeerIdentity, PortSecurity

cdef enum:
    STATUS_RESOURCE_EXHAUSTED = 8
    STATUS_INTERNAL = 13


cdef class IoThread:
    """One epoll thread with all its connections. Like ``NativeServer``, but that it listens by itself.

    All methods belong to the loop's thread. A slow call is started with ``on_call(call)``.
    """

    def __cinit__(self, loop, on_call, Router router=None, *, str fast_path="", double greeting_timeout_s=20.0,
                  double write_timeout_s=60.0, ConnectionRules rules=None, ServerLedger ledger=None,
                  uint32_t packed_encodings=0, Passes passes=None, **limits):
        cdef SessionLimits bounds = SessionLimits(**limits)
        cdef bytes path = fast_path.encode() if router is not None else b""
        self.loop, self.on_call = loop, on_call
        self.open_calls, self.idle_waiters = set(), []
        self.state = new_io(&bounds.limits, <const uint8_t *> PyBytes_AS_STRING(path), len(path),
                            router.state if router is not None else NULL,
                            <int64_t> (greeting_timeout_s * 1e9), <int64_t> (write_timeout_s * 1e9))
        if self.state == NULL:
            raise OSError("no file descriptor or memory left for an I/O thread")
        if rules is None:
            rules = ConnectionRules()
        set_rules(self.state.group, &rules.rules, ledger.ledger if ledger is not None else NULL, packed_encodings)
        if passes is not None:
            set_passes(self.state.group, passes.table)
        loop.add_reader(self.state.crossing.events_fd, self._on_events)

    def __dealloc__(self):
        # the loop holds a reference through add_reader, the thread while it runs: here both have ended
        if self.state != NULL:
            free_io(self.state)

    # ------------------------------------------------------------------------------------------ what the door calls
    def listen(self, int descriptor, tls=None):
        """Accepts on a copy of this listening socket's descriptor, from ``start`` on. OSError: it cannot.

        With a ``TlsContext`` connections are encrypted; it is kept for as long as any of them is open.
        """
        cdef PortSecurity *security = NULL
        if tls is not None:
            security = <PortSecurity *> PyCapsule_GetPointer(tls.capsule, b"aiorch.PortSecurity")
        copy = os.dup(descriptor)
        os.set_blocking(copy, False)
        if add_listener(self.state, copy, security) < 0:
            raise OSError("an I/O thread cannot watch this listening socket")

    def start(self, str name="aiorch-io"):
        """Starts the thread and gives the system's id of it; once only. RuntimeError: it was started, or the system has no more threads."""
        if self.thread is not None or self.is_closed:
            raise RuntimeError("an I/O thread is started once")
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        thread.start()
        self.thread = thread        # only now: where no thread could be had, nobody waits for it
        return thread.native_id

    def _run(self):
        with nogil:
            run_loop(self.state)

    @property
    def connections(self):
        """The number of open connections, as of the thread's last round."""
        return aiorch_load_size(&self.state.shown_connections)

    @property
    def in_flight(self):
        """The number of requests of the fast path that have not come back from their queues, likewise."""
        return aiorch_load_size(&self.state.shown_in_flight)

    def drain(self):
        """Stops listening, tells all clients to open no more streams; connections close when they are answered."""
        self.order(COMMAND_DRAIN, 0, b"")

    def cancel_calls(self, int code, str text):
        """Answers all open calls with this status; handlers of slow calls are told that they are over."""
        self.order(COMMAND_CANCEL_CALLS, code, text.encode())

    def abort_connections(self):
        """Closes all connections now, whatever is still unsent."""
        self.order(COMMAND_ABORT, 0, b"")

    def wait_disconnected(self):
        """A future that is done when, after ``drain``, no connection is open."""
        waiter = self.loop.create_future()
        if self.is_idle or self.thread is None or self.is_closed:
            waiter.set_result(None)
        else:
            self.idle_waiters.append(waiter)
        return waiter

    def close(self):
        """Closes what is open, ends the thread and waits for that (it never blocks for long); then lets go of the loop.

        Requests still in flight are taken back on the loop when they come.
        """
        if self.is_closed:
            return
        if self.thread is not None:
            self.order(COMMAND_STOP, 0, b"")
            self.thread.join()
        self.is_closed = True
        close_listeners(self.state)
        self.loop.remove_reader(self.state.crossing.events_fd)
        self._on_events()
        close_commands(self.state.crossing)
        self.is_idle = True
        self._tell_idle()
        settle_late(self.state)
        if self.in_flight:
            self.loop.add_reader(self.state.sink.wake_fd, self._on_settled)

    def _on_settled(self):
        settle_late(self.state)
        if not self.in_flight:
            self.loop.remove_reader(self.state.sink.wake_fd)

    cdef int order(self, CommandKind kind, int code, bytes text) except -1:
        cdef Command *command
        cdef size_t size = <size_t> PyBytes_GET_SIZE(text) + 1
        if self.thread is None or self.is_closed:
            return 0
        command = new_command(NULL, kind)
        if command == NULL:
            raise MemoryError
        command.code, command.size = code, size
        command.data = new_buffer(size, 0)
        if command.data == NULL:
            free_command(command)
            raise MemoryError
        memcpy(command.data, PyBytes_AS_STRING(text), size)
        put_command(self.state.crossing, command)
        return 0

    # --------------------------------------------------------------------------------------------- what the loop calls
    def _on_events(self):
        """The thread has something to say: to each call in order, each guarded alone."""
        cdef Event *event = take_events(self.state.crossing)
        cdef Event *following
        exiting = None
        while event != NULL:
            following = event.next
            try:
                self.handle_event(event)
            except Exception as error:
                self.loop.call_exception_handler(
                    {"message": "a call could not be started or told", "exception": error, "protocol": self})
            except BaseException as error:      # an order to exit: the other calls are told first
                exiting = error
            finally:
                free_event(event)
            event = following
        if exiting is not None:
            raise exiting

    cdef int handle_event(self, Event *event) except -1:
        if event.link != NULL:
            return self.handle_call_event(event)
        self.is_idle = True
        self._tell_idle()
        return 0

    def _tell_idle(self):
        waiters, self.idle_waiters = self.idle_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    cdef int handle_call_event(self, Event *event) except -1:
        cdef Link *link = event.link
        cdef LinkedCall call
        if event.bits & EVENT_OVER:
            if not link.is_ended:
                link.is_ended = True
                link.end.link, link.end.kind = link, COMMAND_RELEASE
                retain_link(link)
                put_command(self.state.crossing, &link.end)
                if link.call != NULL:
                    call = <LinkedCall> link.call
                    call.close()
                    call.end()
            return 0
        if link.is_ended:
            return 0
        if event.bits & EVENT_CALL:
            call = LinkedCall.__new__(LinkedCall)
            try:
                call.open(self, link)
            except Exception:
                if link.call != NULL:
                    call.close()
                link.is_ended = True
                link.end.link, link.end.kind, link.end.code = link, COMMAND_FINISH, STATUS_INTERNAL
                retain_link(link)
                put_command(self.state.crossing, &link.end)
                raise
        else:
            call = <LinkedCall> link.call
        if event.bits & EVENT_MESSAGE:
            try:
                call.inbox.append((PyBytes_FromStringAndSize(<char *> event.data, <Py_ssize_t> event.size),
                                   bool(event.is_compressed)))
            except MemoryError:
                # a servicer that has begun must not go on without it, one that has not would never be asked
                call.put_end(STATUS_RESOURCE_EXHAUSTED, b"Out of memory", b"")
                call.end()
                raise
        if event.bits & EVENT_HALF_CLOSE:
            call.is_half_closed = True
        if event.bits & EVENT_CALL:
            try:
                self.on_call(call)
            except BaseException:
                call.finish(STATUS_INTERNAL, "The server failed to start the call")
                raise
            return 0
        if event.bits & (EVENT_MESSAGE | EVENT_HALF_CLOSE):
            call.wake_reader()
        if event.bits & EVENT_WRITABLE:
            call.wake_writer()
        return 0


cdef class LinkedCall(Call):
    """A call whose stream lives on an I/O thread: it hears events and gives commands."""

    def __dealloc__(self):
        if self.link != NULL:
            release_link(self.link)

    cdef int open(self, IoThread thread, Link *link) except -1:
        self.thread = thread
        self.loop = thread.loop
        self.inbox = deque()
        self.describe(link.metadata, link.metadata_size, link.encoding, link.accepted, link.deadline_ns)
        retain_link(link)
        self.link = link
        link.call = <void *> self
        self.is_open = True
        thread.open_calls.add(self)
        return 0

    cdef Command *new_command(self, CommandKind kind) except NULL:
        cdef Command *command = new_command(self.link, kind)
        if command == NULL:
            raise MemoryError
        return command

    cdef int close(self) except -1:
        """Cuts the tie: nothing is heard, nothing is said any more."""
        self.is_open = False
        self.link.call = NULL
        self.inbox.clear()
        self.thread.open_calls.discard(self)
        return 0

    cdef bint is_linked(self):
        return self.is_open

    cdef bint has_message(self):
        return len(self.inbox) > 0

    cdef object pop_message(self):
        cdef Command *command
        if not self.inbox:
            return None
        command = self.new_command(COMMAND_READ)
        message = self.inbox.popleft()
        command.size = <size_t> PyBytes_GET_SIZE(message[0])
        put_command(self.thread.state.crossing, command)
        return message

    cdef bint has_much_unsent(self):
        return (self.written_bytes - aiorch_load_size(&self.link.sent_bytes)
                > self.thread.state.group.limits.high_water_bytes)

    cdef int ask_writable(self) except -1:
        put_command(self.thread.state.crossing, self.new_command(COMMAND_WANT_WRITABLE))
        return 0

    cdef int put_head(self, bytes packed) except -1:
        cdef Command *command = self.new_command(COMMAND_HEAD)
        cdef size_t size = <size_t> PyBytes_GET_SIZE(packed)
        command.data = new_buffer(size + 1, 0)
        if command.data == NULL:
            free_command(command)
            raise MemoryError
        memcpy(command.data, PyBytes_AS_STRING(packed), size)
        command.size = size
        put_command(self.thread.state.crossing, command)
        return 0

    cdef int put_frame(self, uint8_t *frame, size_t size) except -1:
        cdef Command *command = new_command(self.link, COMMAND_MESSAGE)
        if command == NULL:
            drop_buffer(frame)
            raise MemoryError
        command.data, command.size = frame, size
        self.written_bytes += size
        put_command(self.thread.state.crossing, command)
        return 0

    cdef int put_end(self, int code, bytes text, bytes packed) except -1:
        cdef Link *link = self.link
        cdef Command *command = &link.end
        cdef size_t size = <size_t> PyBytes_GET_SIZE(text)
        cdef size_t more_size = <size_t> PyBytes_GET_SIZE(packed)
        command.link, command.kind, command.code = link, COMMAND_FINISH, code
        # without memory the code alone has to do
        command.data, command.more = new_buffer(size + 1, 0), new_buffer(more_size + 1, 0)
        if command.data != NULL:
            memcpy(command.data, PyBytes_AS_STRING(text), size)
            command.size = size
        if command.more != NULL:
            memcpy(command.more, PyBytes_AS_STRING(packed), more_size)
            command.more_size = more_size
        link.is_ended = True
        retain_link(link)
        self.close()
        put_command(self.thread.state.crossing, command)
        return 0

    cdef str name_peer(self):
        cdef const uint8_t *peer = <const uint8_t *> &self.link.peer
        cdef uint16_t port
        if self.link.peer.ss_family not in (socket.AF_INET, socket.AF_INET6):
            return "unix:"
        # struct sockaddr_in and sockaddr_in6: family, port, then (IPv6: the flow label and) the address
        memcpy(&port, peer + 2, sizeof(port))
        port = socket.ntohs(port)
        if self.link.peer.ss_family == socket.AF_INET:
            return f"ipv4:{socket.inet_ntop(socket.AF_INET, peer[4:8])}:{port}"
        address = socket.inet_ntop(socket.AF_INET6, peer[8:24])
        return f"ipv6:{urllib.parse.quote(f'[{address}]', safe=':')}:{port}"

    cdef object look_up(self, name):
        cdef PeerIdentity *identity = self.link.identity
        if name != "tls_peer" or identity == NULL:
            return None
        certificate = None
        if identity.certificate != NULL:
            certificate = PyBytes_FromStringAndSize(
                <const char *> identity.certificate, <Py_ssize_t> identity.certificate_size)
        return certificate, bool(identity.is_resumed)
