"""The life of a gRPC connection; see h2_life.pxd."""

from libc.stdint cimport uint64_t
from libc.string cimport memcmp, strlen

from aiorch_server._core.h2_answer cimport revoke_stream
from aiorch_server._core.h2_ledger cimport SLACK_BYTES, Ledger, aiorch_add_count, aiorch_load_count
from aiorch_server._core.h2_rules cimport Life
from aiorch_server._core.h2_stream cimport STREAM_FAST, Stream, held_bytes, release_window
from aiorch_server._core.nghttp2 cimport *
from aiorch_server._core.timers cimport clear_timer, next_due, set_timer, take_due

cdef enum:
    STATUS_UNAVAILABLE = 14
    MAX_IDLE_FRAMES = 10000
    PING_BYTES = 8
    RESETS_BURST = 1000
    RESETS_PER_S = 1000
    EXPIRED_RESETS = 16

cdef int64_t MS = 1000000
cdef int64_t DRAIN_ROUND_TRIP_NS = 1000 * MS    # how long the client's answer between the two GOAWAYs is waited for
cdef int64_t LAST_WORDS_NS = 1000 * MS          # how long cancelled calls may take to send their status
cdef int64_t LAST_LOOK_NS = 20 * MS
cdef int64_t HOLD_LOOK_NS = 10 * MS
cdef int64_t MAX_HOLD_NS = 1000 * MS
cdef int64_t HELD_FROM_BYTES = 262144           # of unfinished messages on the connection
cdef int64_t RESET_NS = 1000 * MS // RESETS_PER_S
cdef int64_t PATIENT_NS = 500 * MS              # who leaves calls open so long resets no more than its streams twice a second
cdef int64_t LATE_NS = 1000 * MS                # how much later than its client a busy server may see a call
cdef int64_t PING_INTERVAL_WITHOUT_CALLS_NS = 7200 * 1000 * MS
# what tells the server's PINGs apart when their answers come
cdef const char *KEEPALIVE_PING = b"alive?\0\0"
cdef const char *DRAIN_PING = b"leaving\0"


# ---------------------------------------------------------------------------------------------------------- the books
cdef void balance_books(Connection *connection) noexcept nogil:
    cdef Group *group = connection.group
    cdef int64_t held = held_bytes(connection)
    cdef int64_t drift
    group.held_bytes += held - connection.counted_bytes
    connection.counted_bytes = held
    if group.ledger == NULL:
        return
    drift = group.held_bytes - group.booked_bytes
    if drift > SLACK_BYTES or drift < -SLACK_BYTES or (drift and group.held_bytes == 0):
        aiorch_add_count(&group.ledger.bytes, drift)
        group.booked_bytes = group.held_bytes
    if connection.partial_bytes > <size_t> HELD_FROM_BYTES and not connection.life.is_held and _is_short(group, 0):
        connection.life.is_held = True
        connection.life.held_since_ns = group.now_ns
        _hasten(connection, group.now_ns + HOLD_LOOK_NS)


cdef inline int64_t _sum_bytes(Group *group) noexcept nogil:
    return aiorch_load_count(&group.ledger.bytes) + group.held_bytes - group.booked_bytes


cdef inline bint _is_short(Group *group, int64_t more) noexcept nogil:
    cdef Ledger *ledger = group.ledger
    return (ledger != NULL and ledger.max_bytes != 0
            and _sum_bytes(group) + more > ledger.max_bytes - ledger.max_bytes // 4)


cdef bint has_room(Connection *connection, size_t more) noexcept nogil:
    cdef Group *group = connection.group
    cdef int64_t wanted
    if group.ledger == NULL or group.ledger.max_bytes == 0:
        return True
    wanted = <int64_t> (held_bytes(connection) + more) - connection.counted_bytes
    if _sum_bytes(group) + wanted <= group.ledger.max_bytes:
        return True
    aiorch_add_count(&group.ledger.refused_messages, 1)
    return False


# ------------------------------------------------------------------------------------------------------------- leaving
cdef void begin_leaving(Connection *connection) noexcept nogil:
    # Streams that the client opened before it saw the notice are still taken: a PING's answer proves that it has.
    if connection.life.drain_began_ns or connection.is_broken or connection.life.is_terminating:
        return
    connection.life.drain_began_ns = max(connection.group.now_ns, <int64_t> 1)
    connection.is_draining = True
    if nghttp2_submit_shutdown_notice(connection.session) != 0:
        connection.is_broken = True


cdef void finish_leaving(Connection *connection) noexcept nogil:
    if not connection.is_draining or connection.is_broken:
        return
    connection.is_draining = False
    if nghttp2_submit_goaway(connection.session, NGHTTP2_FLAG_NONE,
                             nghttp2_session_get_last_proc_stream_id(connection.session),
                             NGHTTP2_NO_ERROR, NULL, 0) != 0:
        connection.is_broken = True


cdef void calm_down(Connection *connection, const char *text) noexcept nogil:
    if connection.life.is_terminating or connection.is_broken:
        return
    connection.life.is_terminating = True
    connection.is_draining = False
    _submit_calm(connection, text)


cdef void _submit_calm(Connection *connection, const char *text) noexcept nogil:
    if nghttp2_submit_goaway(connection.session, NGHTTP2_FLAG_NONE,
                             nghttp2_session_get_last_proc_stream_id(connection.session),
                             NGHTTP2_ENHANCE_YOUR_CALM, <const uint8_t *> text, strlen(text)) != 0:
        connection.is_broken = True


# --------------------------------------------------------------------------------------------------------------- PINGs
cdef void note_ping(Connection *connection, const nghttp2_frame *frame) noexcept nogil:
    cdef LifeRules *rules = &connection.group.rules
    cdef Life *life = &connection.life
    cdef int64_t now = connection.now_ns
    cdef int64_t interval = rules.min_ping_interval_ns
    cdef bint is_early
    if frame.hd.flags & NGHTTP2_FLAG_ACK:
        if memcmp(frame.ping.opaque_data, DRAIN_PING, PING_BYTES) == 0:
            finish_leaving(connection)
        elif rules.keepalive_time_ns:
            _hasten(connection, now + rules.keepalive_time_ns)
        return
    note_idle_frame(connection)
    if interval == 0 or rules.max_ping_strikes == 0:
        return
    if connection.n_streams == 0 and not rules.permit_without_calls:
        interval = PING_INTERVAL_WITHOUT_CALLS_NS
    is_early = life.pinged_ns != 0 and now < life.pinged_ns + interval
    life.pinged_ns = now
    if is_early:
        life.n_strikes += 1
        if life.n_strikes > rules.max_ping_strikes:
            calm_down(connection, b"too_many_pings")


cdef void note_ping_sent(Connection *connection, const nghttp2_frame *frame) noexcept nogil:
    if frame.hd.flags & NGHTTP2_FLAG_ACK or memcmp(frame.ping.opaque_data, KEEPALIVE_PING, PING_BYTES) != 0:
        return
    connection.life.is_ping_waiting = False
    connection.life.ping_sent_ns = connection.group.now_ns


cdef void note_idle_frame(Connection *connection) noexcept nogil:
    connection.life.n_idle_frames += 1
    if connection.life.n_idle_frames > MAX_IDLE_FRAMES:
        calm_down(connection, b"too_many_idle_frames")


# -------------------------------------------------------------------------------------------------------------- resets
cdef void note_reset(Connection *connection, Stream *stream) noexcept nogil:
    cdef Life *life = &connection.life
    cdef int64_t now = connection.now_ns
    cdef int64_t burst = max(<int64_t> RESETS_BURST, <int64_t> connection.group.limits.max_concurrent_streams)
    cdef int64_t cost = RESET_NS
    if stream == NULL:
        note_idle_frame(connection)
        return
    if life.has_flooded or now >= stream.opened_ns + PATIENT_NS:
        return
    if stream.deadline.due_ns and now + LATE_NS >= stream.deadline.due_ns:
        cost = RESET_NS // EXPIRED_RESETS
    life.resets_paid_ns = max(life.resets_paid_ns, now) + cost
    if life.resets_paid_ns <= now + burst * RESET_NS:
        return
    life.has_flooded = True
    connection.is_draining = False
    _submit_calm(connection, b"too_many_resets")


cdef void submit_drain_ping(Connection *connection) noexcept nogil:
    if nghttp2_submit_ping(connection.session, NGHTTP2_FLAG_NONE, <const uint8_t *> DRAIN_PING) != 0:
        connection.is_broken = True


# ----------------------------------------------------------------------------------------------- what is due, and when
cdef inline int64_t _earlier(int64_t a_ns, int64_t b_ns) noexcept nogil:
    """Of two due times the first; 0 is never."""
    return b_ns if a_ns == 0 or (b_ns != 0 and b_ns < a_ns) else a_ns


cdef int64_t _check_keepalive(Connection *connection, int64_t now) noexcept nogil:
    cdef LifeRules *rules = &connection.group.rules
    cdef Life *life = &connection.life
    if rules.keepalive_time_ns == 0:
        return 0
    if life.is_unread:
        life.ping_sent_ns = 0
        return now + rules.keepalive_time_ns
    if life.ping_sent_ns and connection.now_ns <= life.ping_sent_ns:
        if now < life.ping_sent_ns + rules.keepalive_timeout_ns:
            return life.ping_sent_ns + rules.keepalive_timeout_ns
        if not life.has_last_look:
            life.has_last_look = True
            return now + LAST_LOOK_NS
        connection.is_broken = True
        return 0
    life.ping_sent_ns = 0
    if now < connection.now_ns + rules.keepalive_time_ns:
        return connection.now_ns + rules.keepalive_time_ns
    if life.is_ping_waiting:            # nothing goes out, which is for the driver to judge
        return now + rules.keepalive_timeout_ns
    if connection.n_streams == 0 and not rules.permit_without_calls:
        return now + rules.keepalive_time_ns
    life.is_ping_waiting, life.has_last_look = True, False
    if nghttp2_submit_ping(connection.session, NGHTTP2_FLAG_NONE, <const uint8_t *> KEEPALIVE_PING) != 0:
        connection.is_broken = True
    return now + rules.keepalive_timeout_ns


cdef int64_t _check_idle(Connection *connection, int64_t now) noexcept nogil:
    cdef int64_t max_idle_ns = connection.group.rules.max_idle_ns
    if max_idle_ns == 0 or connection.life.drain_began_ns:
        return 0
    if connection.n_streams:
        return now + max_idle_ns
    if now < connection.life.idle_since_ns + max_idle_ns:
        return connection.life.idle_since_ns + max_idle_ns
    begin_leaving(connection)
    return 0


cdef int64_t _check_age(Connection *connection, int64_t now) noexcept nogil:
    cdef Life *life = &connection.life
    if life.age_ends_ns == 0 or life.has_aged:
        return 0
    if now < life.age_ends_ns:
        return life.age_ends_ns
    begin_leaving(connection)
    life.has_aged = True
    return 0


cdef int64_t _check_leaving(Connection *connection, int64_t now) noexcept nogil:
    """After the first GOAWAY, whoever asked for it."""
    cdef Life *life = &connection.life
    cdef int64_t grace_ns = connection.group.rules.max_age_grace_ns
    cdef int64_t due = 0
    if life.drain_began_ns == 0:
        return 0
    if connection.is_draining:
        if now < life.drain_began_ns + DRAIN_ROUND_TRIP_NS:
            due = life.drain_began_ns + DRAIN_ROUND_TRIP_NS
        else:
            finish_leaving(connection)
    if not life.has_aged or grace_ns == 0:
        return due
    if now < life.age_ends_ns + grace_ns:
        return _earlier(due, life.age_ends_ns + grace_ns)
    if life.revoked_ns == 0:
        life.revoked_ns = now
        finish_leaving(connection)
        _revoke_calls(connection)
    elif now >= life.revoked_ns + LAST_WORDS_NS:
        connection.is_broken = True
        return 0
    return life.revoked_ns + LAST_WORDS_NS


cdef void _revoke_calls(Connection *connection) noexcept nogil:
    cdef Stream *stream = connection.streams
    while stream != NULL:
        revoke_stream(stream, STATUS_UNAVAILABLE, b"The connection's age and its grace are over")
        stream = stream.older


cdef bint _has_fast_answer(Connection *connection) noexcept nogil:
    cdef Stream *stream = connection.streams
    while stream != NULL:
        if stream.kind == STREAM_FAST and stream.unsent_bytes:
            return True
        stream = stream.older
    return False


cdef int64_t _check_stall(Connection *connection, int64_t now) noexcept nogil:
    cdef int64_t stall_ns = connection.group.rules.stall_ns
    if stall_ns == 0:
        return 0
    if connection.outbound_bytes and now >= connection.life.moved_ns + stall_ns:
        if _has_fast_answer(connection) or _is_short(connection.group, 0):
            connection.is_broken = True
            return 0
    elif connection.outbound_bytes:
        return connection.life.moved_ns + stall_ns
    return now + stall_ns


cdef int64_t _check_hold(Connection *connection, int64_t now) noexcept nogil:
    cdef Life *life = &connection.life
    if not life.is_held:
        return 0
    if _is_short(connection.group, 0) and now < life.held_since_ns + MAX_HOLD_NS:
        return now + HOLD_LOOK_NS
    life.is_held = False
    release_window(connection)
    return 0


cdef int64_t _tend(Connection *connection, int64_t now) noexcept nogil:
    cdef int64_t due
    if connection.life.is_terminating or connection.is_broken:
        return 0
    due = _check_keepalive(connection, now)
    due = _earlier(due, _check_idle(connection, now))
    due = _earlier(due, _check_age(connection, now))
    due = _earlier(due, _check_leaving(connection, now))
    due = _earlier(due, _check_stall(connection, now))
    due = _earlier(due, _check_hold(connection, now))
    if connection.is_broken or due == 0:
        return 0
    return max(due, now + MS)


cdef void _hasten(Connection *connection, int64_t due_ns) noexcept nogil:
    cdef Life *life = &connection.life
    if life.timer.place and life.timer.due_ns <= due_ns:
        return
    clear_timer(&connection.group.lives, &life.timer)
    if set_timer(&connection.group.lives, &life.timer, due_ns, connection) < 0:
        connection.is_broken = True


cdef int begin_life(Connection *connection, int64_t now_ns) noexcept nogil:
    cdef Group *group = connection.group
    cdef LifeRules *rules = &group.rules
    cdef Life *life = &connection.life
    cdef int64_t due
    group.now_ns = connection.now_ns = life.idle_since_ns = life.moved_ns = now_ns
    if rules.max_age_ns:
        # connections that came together, as after a restart, shall not all leave together
        rules.seed = (rules.seed ^ <uint64_t> now_ns) * 6364136223846793005ULL + 1442695040888963407ULL
        life.age_ends_ns = (now_ns + rules.max_age_ns - rules.max_age_ns // 10
                            + <int64_t> ((rules.seed >> 24) % <uint64_t> (rules.max_age_ns // 5 + 1)))
    due = _tend(connection, now_ns)
    return set_timer(&group.lives, &life.timer, due, connection) if due else 0


cdef int64_t next_tending(Group *group) noexcept nogil:
    return next_due(&group.lives)


cdef Connection *tend_due(Group *group, int64_t now_ns) noexcept nogil:
    cdef Connection *connection = <Connection *> take_due(&group.lives, now_ns)
    cdef int64_t due
    group.now_ns = now_ns
    if connection == NULL:
        return NULL
    due = _tend(connection, now_ns)
    if due:
        _hasten(connection, due)
    return connection


cdef class ConnectionRules:
    """What the connections of a server keep to; times in seconds, 0 is never. See h2_life.pxd for each.

    ValueError for a number below 0.
    """

    def __cinit__(self, *, double keepalive_time_s=7200.0, double keepalive_timeout_s=20.0,
                  bint keepalive_permit_without_calls=False, double min_ping_interval_s=300.0, int max_ping_strikes=2,
                  double max_connection_idle_s=0.0, double max_connection_age_s=0.0,
                  double max_connection_age_grace_s=0.0, double stall_timeout_s=60.0, uint64_t seed=1):
        cdef LifeRules *rules = &self.rules
        if min(keepalive_time_s, keepalive_timeout_s, min_ping_interval_s, max_ping_strikes, max_connection_idle_s,
               max_connection_age_s, max_connection_age_grace_s, stall_timeout_s) < 0:
            raise ValueError("rules of connections are 0 (never) or more")
        rules.keepalive_time_ns, rules.keepalive_timeout_ns = _to_ns(keepalive_time_s), _to_ns(keepalive_timeout_s)
        rules.permit_without_calls = keepalive_permit_without_calls
        rules.min_ping_interval_ns, rules.max_ping_strikes = _to_ns(min_ping_interval_s), max_ping_strikes
        rules.max_idle_ns, rules.max_age_ns = _to_ns(max_connection_idle_s), _to_ns(max_connection_age_s)
        rules.max_age_grace_ns, rules.stall_ns = _to_ns(max_connection_age_grace_s), _to_ns(stall_timeout_s)
        rules.seed = seed


cdef int64_t _to_ns(double seconds) noexcept:
    return <int64_t> (min(seconds, 1e9) * 1e9)
