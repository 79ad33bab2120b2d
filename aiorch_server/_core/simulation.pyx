"""Simulated traffic over the server's own queue, batches and forecasts; see simulation.pxd."""

from libc.math cimport exp
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from aiorch_server._core.batch_former cimport (
    MAX_PREFERRED,
    FormedBatch,
    change_policy,
    expected_run,
    find_end,
    form_batch,
)
from aiorch_server._core.curve cimport MAX_ROWS, MAX_RUN_NS, read_curve, run_time
from aiorch_server._core.forecast cimport MAX_FORETOLD, Forecast, foretell, remove_late
from aiorch_server._core.queue cimport clear_queue, init_queue, push_request, remove_all, remove_expired
from aiorch_server._core.request cimport free_request, new_request

import numpy as np

cdef int64_t NEVER = (<int64_t> 1) << 62
# The least time that a run takes, so that time goes on.
cdef int64_t LEAST_RUN_NS = 1


cdef Request *make_request(World *world) noexcept nogil:
    cdef Request *request = world.spare
    if request == NULL:
        return new_request(NULL, 0, 0, 1, NULL, NULL)
    world.spare = request.next
    request.next = NULL
    return request


cdef void give_up(World *world, Request *chain, Fate fate) noexcept nogil:
    """These get no answer."""
    cdef Request *following
    while chain != NULL:
        following = chain.next
        world.latencies_ns[<size_t> chain.owner] = <int64_t> fate
        chain.next = world.spare
        world.spare = chain
        chain = following


cdef void free_chain(Request *chain) noexcept nogil:
    cdef Request *following
    while chain != NULL:
        following = chain.next
        free_request(chain)
        chain = following


cdef int64_t draw_run(World *world, int64_t rows) noexcept nogil:
    cdef const Curve *truth = &world.machine.truth
    cdef double sigma, run_ns = <double> run_time(truth, rows)
    cdef int at = 0
    if world.n_noise:
        while at < truth.n - 1 and truth.rows[at] < rows:
            at += 1
        sigma = world.machine.spreads[at]
        run_ns *= exp(sigma * world.noise[world.n_batches % world.n_noise] - sigma * sigma / 2)
    return max(LEAST_RUN_NS, <int64_t> run_ns)


cdef int64_t meet_stalls(World *world, int64_t run_ns) noexcept nogil:
    """By how much they make this run longer."""
    cdef int64_t held_up_ns = 0
    cdef int64_t left_ns = run_ns
    if world.n_stalls == 0:
        return 0
    while left_ns >= world.until_stall_ns:
        left_ns -= world.until_stall_ns
        held_up_ns += world.stalls_ns[world.stall % world.n_stalls]
        world.stall += 1
        world.until_stall_ns = world.stall_gaps_ns[world.stall % world.n_stalls]
    world.until_stall_ns -= left_ns
    return held_up_ns


cdef void change_speed(World *world, int running, int64_t now) noexcept nogil:
    """So many instances run from now on: what is left of each run takes longer or shorter."""
    cdef double ratio = world.machine.slowdowns[running] / world.machine.slowdowns[max(1, world.running)]
    cdef Runner *runner
    if ratio != 1.0:
        for i in range(world.places):
            runner = &world.runners[i]
            if runner.first != NULL:
                runner.end_ns = now + <int64_t> (<double> (runner.end_ns - now) * ratio)
    world.running = running


cdef void hold_up(World *world, int64_t work_ns) noexcept nogil:
    """The door works, at the cost of who runs where no core is left for it."""
    if work_ns and world.running >= world.machine.cores:
        for i in range(world.places):
            if world.runners[i].first != NULL:
                world.runners[i].end_ns += <int64_t> (<double> work_ns / world.machine.cores)


cdef void start(World *world, Runner *runner, const FormedBatch *batch, int64_t now) noexcept nogil:
    cdef Request *request = batch.first
    cdef int64_t run_ns
    change_speed(world, world.running + 1, now)
    runner.first, runner.rows, runner.taken_ns, runner.batch = batch.first, batch.rows, now, world.n_batches
    run_ns = <int64_t> (<double> draw_run(world, batch.rows) * world.machine.slowdowns[world.running])
    runner.end_ns = now + run_ns + meet_stalls(world, run_ns)
    world.batch_starts_ns[world.n_batches] = now
    world.batch_rows[world.n_batches] = batch.rows
    while request != NULL:
        world.batch_of[<size_t> request.owner] = world.n_batches
        request = request.next
    world.n_batches += 1


cdef void look(World *world, int64_t now) noexcept nogil:
    """A free instance takes a batch, if one is due, and calls the next if there is more to do."""
    cdef FormedBatch batch
    cdef Runner *idle = NULL
    world.look_ns = NEVER
    if world.queue.n == 0 or world.running >= world.instances:
        return
    give_up(world, remove_expired(&world.queue, now), EXPIRED)
    give_up(world, remove_late(&world.queue, &world.policy, now), LATE_IN_QUEUE)
    form_batch(&world.queue, &world.policy, now, &batch)
    if batch.first == NULL:
        if batch.wake_ns:
            world.look_ns = batch.wake_ns
        if world.queue.next_expiry_ns:
            world.look_ns = min(world.look_ns, world.queue.next_expiry_ns)
        if world.look_ns != NEVER:
            world.look_ns = max(world.look_ns, now) + world.machine.wake_ns
        return
    for i in range(world.places):
        if world.runners[i].first == NULL:
            idle = &world.runners[i]
            break
    start(world, idle, &batch, now)
    if world.queue.n and world.running < world.instances:
        world.look_ns = now + world.machine.wake_ns


cdef bint is_late(World *world, const Request *request, int64_t now) noexcept nogil:
    """As admission has it: is_too_late and list_free."""
    cdef int64_t free_ns[MAX_FORETOLD]
    cdef Forecast forecast
    cdef int idle = world.instances - world.running
    cdef int n = 0
    if not world.policy.is_shedding or world.policy.curve.n == 0 or request.end_ns == 0:
        return False
    for i in range(world.places):
        free_ns[n] = now
        if world.runners[i].first == NULL:
            if idle <= 0:
                continue
            idle -= 1
        else:
            free_ns[n] = world.runners[i].taken_ns + expected_run(&world.policy, world.runners[i].rows)
            if free_ns[n] <= now:
                free_ns[n] = now + (now - free_ns[n])
        n += 1
    foretell(&world.queue, &world.policy, request, free_ns, n, now, &forecast)
    return forecast.late_ns > 0


cdef bint enter(World *world, Py_ssize_t number, int64_t rows, int64_t level, int64_t deadline_ns, int64_t shape,
                int64_t now) noexcept nogil:
    """The door has read a request. False: out of memory."""
    cdef Request *request = make_request(world)
    if request == NULL:
        return False
    request.owner = <void *> number
    request.shape_key[0] = shape
    request.rows = rows
    request.level = <uint32_t> level << 1
    request.received_ns = world.arrivals_ns[number]
    request.enqueued_ns = now
    request.deadline_ns = deadline_ns
    request.expires_ns = now + world.expiry_ns if world.expiry_ns else 0
    request.end_ns = find_end(&world.policy, request)
    hold_up(world, world.machine.door_ns)
    if is_late(world, request, now):
        give_up(world, request, LATE_AT_DOOR)
    elif world.queue.n >= world.max_waiting:
        give_up(world, request, NO_ROOM)
    elif not push_request(&world.queue, request):
        free_request(request)
        return False
    elif world.running < world.instances:
        world.look_ns = min(world.look_ns, now + world.machine.wake_ns)
    return True


cdef void finish(World *world, Runner *runner, int64_t now) noexcept nogil:
    """A run is over: its instance looks for the next at once, and the door writes the answers."""
    cdef Request *request = runner.first
    cdef Request *following
    cdef int64_t written_ns = max(now, world.door_free_ns)
    cdef int64_t work_ns = 0
    world.batch_ends_ns[runner.batch] = now
    runner.first = NULL
    change_speed(world, world.running - 1, now)
    while request != NULL:
        following = request.next
        work_ns += world.machine.answer_ns
        world.latencies_ns[<size_t> request.owner] = written_ns + work_ns - request.received_ns
        request.next = world.spare
        world.spare = request
        request = following
    world.door_free_ns = written_ns + work_ns
    look(world, now)
    hold_up(world, work_ns)


cdef bint run_world(World *world, int64_t until_ns) noexcept nogil:
    """Until then, or until nothing is left to happen. False: out of memory."""
    cdef Py_ssize_t number
    cdef Runner *first
    cdef int64_t entered_ns, next_ns
    while True:
        first = NULL
        for i in range(world.places):
            if world.runners[i].first != NULL and (first == NULL or world.runners[i].end_ns < first.end_ns):
                first = &world.runners[i]
        entered_ns = NEVER
        number = world.next
        if number < world.n:
            if world.begun_ns == NEVER:
                world.begun_ns = max(world.arrivals_ns[number], world.door_free_ns)
            entered_ns = world.begun_ns + world.machine.door_ns
        next_ns = min(entered_ns, world.look_ns)
        if first != NULL:
            next_ns = min(next_ns, first.end_ns)
        if next_ns == NEVER or next_ns > until_ns:
            return True
        if first != NULL and first.end_ns <= entered_ns and first.end_ns <= world.look_ns:
            if first.end_ns < world.begun_ns:
                world.begun_ns = NEVER      # the answers may come before it
            else:
                world.door_free_ns = entered_ns
            finish(world, first, first.end_ns)
        elif entered_ns <= world.look_ns:
            world.door_free_ns = max(world.door_free_ns, entered_ns)
            world.begun_ns = NEVER
            world.next += 1
            if not enter(world, number, world.rows[number], world.levels[number], world.deadlines_ns[number],
                         world.shapes[number], entered_ns):
                return False
            if world.look_ns <= entered_ns:
                look(world, entered_ns)
        else:
            look(world, world.look_ns)


cdef void drop_world(World *world) noexcept nogil:
    """What became of whom stays as it is: its memory may be gone."""
    free_chain(remove_all(&world.queue))
    for i in range(world.places):
        free_chain(world.runners[i].first)
    clear_queue(&world.queue)
    free_chain(world.spare)
    free(world)


cdef int64_t[::1] read_numbers(values, Py_ssize_t n, int64_t usual, int64_t least, int64_t most, str name):
    """An array of one number for each request, checked; None: the usual one."""
    if values is None:
        return np.full(n, usual, np.int64)
    array = np.ascontiguousarray(values, np.int64)
    if array.shape != (n,) or n and not least <= array.min() <= array.max() <= most:
        raise ValueError(f"{name} must be {n} numbers within {least}..{most}")
    return array


cdef object set_machine(Machine *machine, truth, spreads, slowdowns, int instances, double cores, int64_t door_ns,
                        int64_t answer_ns, int64_t wake_ns):
    read_curve(&machine.truth, truth)
    spreads = list(spreads) or [0.0] * machine.truth.n
    slowdowns = list(slowdowns) or [1.0] * instances
    if machine.truth.n == 0 or len(spreads) != machine.truth.n or not all([0 <= each <= 10 for each in spreads]):
        raise ValueError("a truth of at least one point is needed, and a spread of 0 to 10 for each of its points")
    if len(slowdowns) != instances or not all([0 < each < 1e6 for each in slowdowns]) or not cores > 0:
        raise ValueError("a positive slowdown is needed for each number of instances that run, and positive cores")
    if min(door_ns, answer_ns, wake_ns) < 0 or max(door_ns, answer_ns, wake_ns) > NEVER >> 20:
        raise ValueError("door_ns, answer_ns and wake_ns must not be negative, nor days")
    for i, each in enumerate(spreads):
        machine.spreads[i] = each
    machine.slowdowns[0] = 1.0
    for i, each in enumerate(slowdowns):
        machine.slowdowns[i + 1] = each
    machine.cores, machine.door_ns, machine.answer_ns, machine.wake_ns = cores, door_ns, answer_ns, wake_ns


cdef object set_policy(BatchPolicy *policy, max_rows, delay_ns, target_ns, margin_ns, preferred, is_deferring,
                       is_shedding, curve, instances):
    sizes = sorted(preferred)
    if len(sizes) > MAX_PREFERRED or sizes and sizes[0] < 1:
        raise ValueError(f"at most {<int> MAX_PREFERRED} preferred sizes, of at least 1 row")
    change_policy(policy, MAX_ROWS, max_rows, delay_ns, target_ns, margin_ns, is_deferring, is_shedding, instances, curve)
    policy.n_preferred = len(sizes)
    for i, size in enumerate(sizes):
        policy.preferred[i] = size


cdef class Simulation:
    """What becomes of requests that arrive at these times; see simulation.pxd for the machine.

    The policy's fields are those of ``Scheduler.set_policy`` in nanoseconds; ``curve`` is what the policy believes of run
    times, ``truth`` what they are. Levels count from 0, the most urgent; deadlines are times as arrivals are, 0 for none;
    requests of different ``shapes`` share no batch. ``noise`` are standard normal values, one for each batch in turn,
    ``spreads`` the standard deviation of the logarithm of a run time at each point of the truth; ``stalls_ns`` come after
    ``stall_gaps_ns`` of running (at least 1 us), each in turn. ValueError where a number is out of its bounds, or arrivals
    do not ascend from 0 on.

    Nothing has happened until ``advance`` is called. ``latencies_ns`` has of each request its latency (answer written -
    arrived), one of the fates, all negative, or 0 as long as neither is settled; ``batch_of`` the batch that it ran in, -1
    for none. Batches are in the order in which they started; the end of one that still runs is 0.
    """

    cdef readonly object latencies_ns
    cdef readonly object batch_of
    cdef World *world
    cdef object held                # what the world points into
    cdef int64_t[::1] starts, ends, sizes

    def __cinit__(self, arrivals_ns, *, truth, rows=None, levels=None, deadlines_ns=None, shapes=None,
                  int64_t max_rows=1, int64_t delay_ns=0, int64_t target_ns=0, int64_t margin_ns=0, preferred=(),
                  bint is_deferring=False, bint is_shedding=False, curve=(), int instances=1, int64_t max_waiting=16384,
                  int64_t expiry_ns=0, spreads=(), noise=None, slowdowns=(), double cores=64.0, int64_t door_ns=0,
                  int64_t answer_ns=0, int64_t wake_ns=0, stall_gaps_ns=(), stalls_ns=()):
        cdef const int64_t[::1] times = np.ascontiguousarray(arrivals_ns, np.int64)
        cdef Py_ssize_t n = len(times)
        cdef const int64_t[::1] row_numbers, level_numbers, deadline_numbers, shape_numbers
        cdef const double[::1] normals = np.ascontiguousarray([] if noise is None else noise, np.float64)
        cdef const int64_t[::1] gaps, stalls
        cdef int64_t[::1] latencies, batches
        cdef World *world
        if not 1 <= instances <= MAX_SIMULATED or max_waiting < 1 or not 0 <= expiry_ns < NEVER >> 1:
            raise ValueError(f"instances must be 1..{<int> MAX_SIMULATED}, max_waiting at least 1, expiry_ns not negative")
        if n and (times[0] < 0 or times[n - 1] > NEVER >> 2 or np.any(np.diff(times) < 0)):
            raise ValueError("arrivals must ascend from 0 on")
        if not np.all(np.isfinite(normals)):
            raise ValueError("noise must be numbers")
        row_numbers = read_numbers(rows, n, 1, 1, MAX_ROWS, "rows")
        level_numbers = read_numbers(levels, n, 0, 0, 1 << 20, "levels")
        deadline_numbers = read_numbers(deadlines_ns, n, 0, 0, NEVER >> 1, "deadlines_ns")
        shape_numbers = read_numbers(shapes, n, 0, -(NEVER >> 1), NEVER >> 1, "shapes")
        gaps = read_numbers(stall_gaps_ns, len(stalls_ns), 0, 1000, NEVER >> 1, "stall_gaps_ns")
        stalls = read_numbers(stalls_ns, len(stalls_ns), 0, 0, MAX_RUN_NS, "stalls_ns")
        self.latencies_ns, self.batch_of = np.zeros(n, np.int64), np.full(n, -1, np.int64)
        self.starts, self.ends, self.sizes = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
        latencies, batches = self.latencies_ns, self.batch_of
        self.held = (times, row_numbers, level_numbers, deadline_numbers, shape_numbers, normals, gaps, stalls, latencies,
                     batches)
        self.world = world = <World *> calloc(1, sizeof(World))
        if world == NULL:
            raise MemoryError
        init_queue(&world.queue, 1)
        world.look_ns = world.begun_ns = NEVER
        world.places = world.instances = instances
        world.max_waiting, world.expiry_ns = max_waiting, expiry_ns
        set_machine(&world.machine, truth, spreads, slowdowns, instances, cores, door_ns, answer_ns, wake_ns)
        set_policy(&world.policy, max_rows, delay_ns, target_ns, margin_ns, preferred, is_deferring, is_shedding, curve,
                   instances)
        if n == 0:
            return
        world.n = n
        world.arrivals_ns, world.latencies_ns, world.batch_of = &times[0], &latencies[0], &batches[0]
        world.rows, world.levels = &row_numbers[0], &level_numbers[0]
        world.deadlines_ns, world.shapes = &deadline_numbers[0], &shape_numbers[0]
        world.batch_starts_ns, world.batch_ends_ns, world.batch_rows = &self.starts[0], &self.ends[0], &self.sizes[0]
        world.n_noise = len(normals)
        if world.n_noise:
            world.noise = &normals[0]
        world.n_stalls = len(stalls)
        if world.n_stalls:
            world.stall_gaps_ns, world.stalls_ns, world.until_stall_ns = &gaps[0], &stalls[0], gaps[0]

    def __dealloc__(self):
        if self.world != NULL:
            drop_world(self.world)

    def advance(self, until_ns=None):
        """Lets happen what does until then, that moment included; all of it without one. Without the interpreter lock.

        ValueError where that is in the past.
        """
        cdef int64_t until = NEVER if until_ns is None else until_ns
        cdef bint is_done
        if not self.world.now_ns <= until <= NEVER:
            raise ValueError(f"{until} ns is over: all until {self.world.now_ns} ns has happened")
        with nogil:
            is_done = run_world(self.world, until)
        if not is_done:
            raise MemoryError
        self.world.now_ns = until

    def set_policy(self, *, max_rows=None, delay_ns=None, target_ns=None, margin_ns=None, is_deferring=None,
                   is_shedding=None, curve=None, instances=None):
        """Changes what is given, from now on; ``instances`` up to those that the simulation was made with.

        More of them look for work at once; of fewer, those that run end what they run. ValueError: nothing was changed.
        """
        cdef World *world = self.world
        if instances is not None and not 1 <= instances <= world.places:
            raise ValueError(f"instances is {instances}; expected 1..{world.places}")
        change_policy(&world.policy, MAX_ROWS, max_rows, delay_ns, target_ns, margin_ns, is_deferring, is_shedding,
                      instances, curve)
        if instances is not None:
            world.instances = instances
        if world.queue.n and world.running < world.instances:
            world.look_ns = min(world.look_ns, world.now_ns + world.machine.wake_ns)

    @property
    def waiting(self):
        """Requests in the queue."""
        return self.world.queue.n

    @property
    def running(self):
        """Instances that run a batch."""
        return self.world.running

    @property
    def batch_starts_ns(self):
        return np.asarray(self.starts)[:self.world.n_batches]

    @property
    def batch_ends_ns(self):
        return np.asarray(self.ends)[:self.world.n_batches]

    @property
    def batch_rows(self):
        return np.asarray(self.sizes)[:self.world.n_batches]


def simulate(arrivals_ns, **how):
    """A ``Simulation`` of these requests in which all has happened."""
    done = Simulation(arrivals_ns, **how)
    done.advance()
    return done
