"""What a queue notes while somebody records: bounded, one at a time, refused requests too."""

from __future__ import annotations

from array import array

import pytest
from hand_driven import make_spec, message

from aiorch_server._core import Mailbox, Scheduler
from aiorch_server._core.scheduler import MAX_RECORDED
from aiorch_server.errors import QueueFull


def read(scheduler: Scheduler) -> tuple[list[int], list[int], int]:
    times, rows, lost = scheduler.take_recording()
    return array("q", times).tolist(), array("i", rows).tolist(), lost


async def test_what_finds_no_room_is_counted(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), max_queue_size=4)
    kept = [mailbox.submit(scheduler, message(0))]
    scheduler.start_recording(2)
    kept += [mailbox.submit(scheduler, message(index)) for index in range(3)]
    first, rows, lost = read(scheduler)
    assert (len(first), rows, lost) == (2, [1, 1], 1)
    with pytest.raises(QueueFull):
        mailbox.submit(scheduler, message(9))
    second, rows, lost = read(scheduler)
    assert (rows, lost) == ([1], 0)
    assert [*first, *second] == sorted([*first, *second]) and first[0] >= 0
    assert read(scheduler) == ([], [], 0)
    for each in kept:
        each.cancel()


def test_one_at_a_time(scheduler: Scheduler) -> None:
    with pytest.raises(ValueError, match="nobody records"):
        scheduler.take_recording()
    scheduler.stop_recording()
    scheduler.start_recording()
    with pytest.raises(ValueError, match="one recording at a time"):
        scheduler.start_recording()
    scheduler.stop_recording()
    with pytest.raises(ValueError, match="nobody records"):
        scheduler.take_recording()
    scheduler.start_recording()  # freed with its scheduler


@pytest.mark.parametrize("number", [0, -1, MAX_RECORDED + 1])
def test_bounds(scheduler: Scheduler, number: int) -> None:
    with pytest.raises(ValueError, match=r"expected 1\.\.1000000"):
        scheduler.start_recording(number)
