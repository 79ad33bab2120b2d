# How long connections live and how quiet or noisy they may be: the rules of a group, and where a connection stands.
# See h2_life.pxd for what is done with them.

from libc.stdint cimport int64_t, uint64_t

from aiorch_server._core.timers cimport Timer


cdef struct LifeRules:                  # times in ns; 0: never
    int64_t keepalive_time_ns           # nothing received for so long: PING
    int64_t keepalive_timeout_ns        # nothing received for so long after it: closed
    bint permit_without_calls           # PINGs in either direction while there are no calls
    int64_t min_ping_interval_ns        # a client's PINGs come no closer, unless something is sent between them
    int max_ping_strikes                # more that do: closed; 0: any number
    int64_t max_idle_ns                 # without calls
    int64_t max_age_ns                  # plus or minus a tenth
    int64_t max_age_grace_ns            # for what is in flight then
    int64_t stall_ns                    # how long answers may wait for the client's windows, see h2_life.pxd
    uint64_t seed                       # of the tenth


cdef struct Life:
    Timer timer                         # in the group's `lives`
    int64_t age_ends_ns                 # 0: never
    int64_t idle_since_ns               # while there are no streams
    int64_t moved_ns                    # when an answer's bytes were last sent, or began to wait
    # the server's own PING
    bint is_ping_waiting                # submitted, not sent
    bint has_last_look                  # the answer is late; a driver that was busy itself may find it yet
    bint is_unread                      # set by the driver: nobody reads the socket, so silence means nothing
    int64_t ping_sent_ns                # 0: none is unanswered
    # leaving
    int64_t drain_began_ns              # 0: not leaving
    bint has_aged                       # by itself, not because the server stops
    int64_t revoked_ns                  # when what was in flight was cancelled
    bint is_terminating                 # the last GOAWAY is submitted; nothing is taken any more ...
    bint is_terminated                  # ... and it is sent, nothing follows
    # the client's PINGs, and frames that ask for nothing
    int64_t pinged_ns                   # 0: none since something was sent
    int n_strikes
    int n_idle_frames
    # the client's resets: all that were counted are paid for at this time; see RESETS_PER_S
    int64_t resets_paid_ns
    bint has_flooded
    # windows withheld while the server is short of memory
    bint is_held
    int64_t held_since_ns
