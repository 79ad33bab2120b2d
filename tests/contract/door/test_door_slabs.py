"""Images that run together are received where they run: what a batch of them costs, and what may come in between."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import hyperframe.frame
import numpy as np
import pytest
from aiorch_backends.identity.echo import Echo

from aiorch_server._core import Batch, ModelSpec, Router, Scheduler, encode_request, read_copied_bytes, serve_compiled
from aiorch_server.types import DataType, ModelSignature, TensorSpec

from .conftest import TIMEOUT_S, Door, wait_until
from .test_door_copies import FIRST_READ_BYTES, IMAGE_BYTES, SHAPE, RawClient, count, image, write_call

read_slab_bytes: Any = importlib.import_module("aiorch_server._core.buffers").read_slab_bytes

BATCH = 4
FRAME_BYTES = 9 + 16384
SIGNATURE = ModelSignature((TensorSpec("X", DataType.FP32, SHAPE),), (TensorSpec("Y", DataType.FP32, SHAPE),), BATCH)


class Model:
    """An echo that writes nothing; it waits for a full batch."""

    def __init__(self, name: str) -> None:
        self.scheduler = Scheduler(ModelSpec(name, 1, SIGNATURE), max_queue_delay_us=3_600_000_000)
        self.echo = Echo(1, 0)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        assert serve_compiled(Batch(self.scheduler), self.echo.capsule) is None

    def stop(self) -> None:
        self.scheduler.close()
        self.thread.join(TIMEOUT_S)


class Site:
    """A door on one I/O thread; four clients whose images make a batch, again and again."""

    def __init__(self, make_door: Callable[..., Door]) -> None:
        self.router = Router()
        self.models = {name: Model(name) for name in ("image", "other")}
        self.publish()
        self.door = make_door("native-asyncio-1", router=self.router)
        self.clients = [RawClient(self.door.port) for _ in range(BATCH)]
        self.ids = [-1] * BATCH
        for _ in range(6):  # until batches are usual
            self.ask_all()

    def publish(self) -> None:
        self.router.publish({name: (1, {1: model.scheduler}) for name, model in self.models.items()})

    def send(self, number: int, array: Any, first: int = 0, last: int | None = None, model: str = "image") -> None:
        """A part of a client's next call; from its beginning on, it is a new one."""
        if first == 0:
            self.ids[number] += 2
            self.call = write_call(self.clients[number].encoder, self.ids[number], array, model)
        self.clients[number].socket.sendall(self.call[first:last])

    def start(self, number: int, array: Any) -> bytes:
        """Sends a head and half of an image, and waits until it lies in its row; gives the rest."""
        before = read_copied_bytes()["received"]
        self.send(number, array, 0, 0)
        half = 9 + int.from_bytes(self.call[:3], "big") + 18 * FRAME_BYTES  # whole frames
        self.clients[number].socket.sendall(self.call[:half])
        wait_until(lambda: read_copied_bytes()["received"] > before, "the head")
        return self.call[half:]

    def answers(self, number: int, array: Any) -> None:
        assert (self.clients[number].answer(self.ids[number]) == array).all()

    def ask_all(self, model: str = "image") -> dict[str, int]:
        """One batch; what it copied."""
        before = read_copied_bytes()
        for number in range(BATCH):
            self.send(number, image(number), model=model)
        for number in range(BATCH):
            self.answers(number, image(number))
        return count(before)

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        for model in self.models.values():
            model.stop()
        # all connections are gone when the door has seen them; nothing may keep a row then
        wait_until(lambda: read_slab_bytes() == 0, "the end of all rows")


@pytest.fixture
def site(make_door: Callable[..., Door]) -> Iterator[Site]:
    site = Site(make_door)
    yield site
    site.stop()


def reset(site: Site, number: int) -> None:
    site.clients[number].socket.sendall(hyperframe.frame.RstStreamFrame(site.ids[number], 8).serialize())


# ------------------------------------------------------------------------------------------------------------ how often
def test_the_images_of_a_batch_are_not_copied(site: Site) -> None:
    for _ in range(5):
        copied = site.ask_all()
        assert copied["gathered"] == copied["encoded"] == 0
        assert copied["received"] <= BATCH * FIRST_READ_BYTES
        assert copied["sent"] < BATCH * 200


def test_the_order_of_the_last_bytes_does_not_matter(site: Site) -> None:
    before = read_copied_bytes()
    rests = [site.start(number, image(number)) for number in range(BATCH)]
    for number in (2, 0, 3, 1):
        site.clients[number].socket.sendall(rests[number])
    for number in range(BATCH):
        site.answers(number, image(number))
    assert count(before)["gathered"] == 0


def test_two_models_have_rows_of_their_own(site: Site) -> None:
    for _ in range(6):
        site.ask_all("other")
    before = read_copied_bytes()
    others = [RawClient(site.door.port) for _ in range(BATCH)]
    for number, other in enumerate(others):
        other.socket.sendall(write_call(other.encoder, 1, image(9 + number), "other"))
        site.send(number, image(number))
    for number, other in enumerate(others):
        assert (other.answer(1) == image(9 + number)).all()
        site.answers(number, image(number))
        other.close()
    assert count(before)["gathered"] == 0


# --------------------------------------------------------------------------------------------------- what comes between
def test_a_call_that_is_reset_leaves_a_hole(site: Site) -> None:
    site.send(0, image(0))
    site.start(1, image(1))
    reset(site, 1)
    before = read_copied_bytes()
    for number in (1, 2, 3):
        site.send(number, image(number))
    for number in range(BATCH):
        site.answers(number, image(number))
    assert count(before)["gathered"] == BATCH * IMAGE_BYTES
    assert site.ask_all()["gathered"] == 0


def test_a_client_that_goes_in_the_middle_of_its_row(site: Site) -> None:
    lost = RawClient(site.door.port)
    lost.socket.sendall(write_call(lost.encoder, 1, image(7))[:300_000])
    site.send(0, image(0))
    lost.close()
    for number in (1, 2, 3):
        site.send(number, image(number))
    for number in range(BATCH):
        site.answers(number, image(number))
    assert site.ask_all()["gathered"] == 0


def test_who_never_sends_what_it_announced_holds_nobody_up(site: Site) -> None:
    """Its row is a hole of its slab alone, and what all slabs take is bounded."""
    idle = [RawClient(site.door.port) for _ in range(3)]
    for client in idle:
        before = read_copied_bytes()["received"]
        client.socket.sendall(write_call(client.encoder, 1, image(7))[:20_000])
        wait_until(lambda: read_copied_bytes()["received"] > before, "the head")  # noqa: B023
        for _ in range(3):
            site.ask_all()
    assert site.ask_all()["gathered"] == 0
    assert 0 < read_slab_bytes() <= 64 << 20
    for client in idle:
        client.close()


def test_a_queued_image_whose_client_goes_leaves_a_hole(site: Site) -> None:
    scheduler = site.models["image"].scheduler
    site.send(0, image(0))
    site.send(1, image(1))
    wait_until(lambda: scheduler.pending == 2, "two images")
    reset(site, 0)
    wait_until(lambda: scheduler.pending == 1, "one image")
    for number in (0, 2, 3):
        site.send(number, image(number + 10))
    site.answers(1, image(1))
    for number in (0, 2, 3):
        site.answers(number, image(number + 10))


def test_a_model_that_is_replaced_meanwhile_takes_the_rows(site: Site) -> None:
    rests = [site.start(number, image(number)) for number in range(BATCH)]
    old, site.models["image"] = site.models["image"], Model("image")
    site.publish()
    old.stop()
    del old
    for number in range(BATCH):
        site.clients[number].socket.sendall(rests[number])
    for number in range(BATCH):
        site.answers(number, image(number))


def test_a_model_that_is_unloaded_meanwhile_leaves_the_call_to_python(site: Site) -> None:
    rest = site.start(0, image(0))
    site.models.pop("image").stop()
    site.publish()
    site.clients[0].socket.sendall(rest)
    while site.ids[0] not in site.clients[0].ended:
        site.clients[0].read_frame()  # nobody serves it here: the call is refused
    assert not site.clients[0].data.get(site.ids[0])


@pytest.mark.parametrize("rows", [0, 2, BATCH + 1])
def test_a_length_that_is_not_the_shapes_is_refused_as_ever(site: Site, rows: int) -> None:
    message = encode_request("image", "", "", [("X", "FP32", (rows, *SHAPE), bytes(IMAGE_BYTES))])
    before = read_slab_bytes()
    site.ids[0] += 2
    site.clients[0].socket.sendall(write_call(site.clients[0].encoder, site.ids[0], None, message=message))
    while site.ids[0] not in site.clients[0].ended:
        site.clients[0].read_frame()
    assert not site.clients[0].data.get(site.ids[0])
    assert read_slab_bytes() <= before
    assert site.ask_all()["gathered"] == 0


def test_requests_of_several_rows_have_as_many(site: Site) -> None:
    pair = np.concatenate([image(5), image(6)])
    before = read_copied_bytes()
    site.send(0, pair)
    site.send(1, pair + 1)
    site.answers(0, pair)
    site.answers(1, pair + 1)
    assert count(before)["gathered"] == 0
