"""How often an image is copied between socket and model; what is sent uncopied is still the right answer."""

from __future__ import annotations

import importlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import hpack
import hyperframe.frame
import numpy as np
import pytest
from aiorch_backends.identity.echo import Echo

from aiorch_server._core import (
    Batch,
    ModelSpec,
    Router,
    Scheduler,
    decode_response,
    encode_request,
    read_copied_bytes,
    serve_compiled,
)
from aiorch_server.frontends.grpc import FAST_PATH
from aiorch_server.types import DataType, ModelSignature, TensorSpec

from .conftest import TIMEOUT_S, Door, wait_until

loans: Any = importlib.import_module("aiorch_server._core.loans")

SHAPE = (3, 224, 224)
IMAGE_BYTES = 602_112
FIRST_READ_BYTES = 16384
Model = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def echo(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"Y": inputs["X"]}


class Site:
    """A door on one I/O thread with one model of images; batches wait until the gate is open."""

    def __init__(self, make_door: Callable[..., Door], *, is_compiled: bool = False) -> None:
        spec = (TensorSpec("X", DataType.FP32, SHAPE),)
        signature = ModelSignature(spec, (TensorSpec("Y", DataType.FP32, SHAPE),), 8)
        self.scheduler = Scheduler(ModelSpec("image", 1, signature))
        router = Router()
        router.publish({"image": (1, {1: self.scheduler})})
        self.door = make_door("native-asyncio-1", router=router)
        self.model: Model = echo
        self.clients: list[RawClient] = []
        self.gate = threading.Event()
        self.gate.set()
        self.sizes: list[int] = []
        self.flags: list[tuple[bool, int]] = []
        self.thread = threading.Thread(target=self.serve_compiled if is_compiled else self.serve)
        self.thread.start()

    def serve(self) -> None:
        Batch(self.scheduler).serve(self.run)

    def serve_compiled(self) -> None:
        echo = Echo(1, 0)
        assert serve_compiled(Batch(self.scheduler), echo.capsule) is None

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        self.gate.wait(TIMEOUT_S)
        self.sizes.append(len(inputs["X"]))
        self.flags.append((inputs["X"].flags.c_contiguous, inputs["X"].ctypes.data % 64))
        return self.model(inputs)

    def connect(self, **options: int) -> RawClient:
        self.clients.append(RawClient(self.door.port, **options))
        return self.clients[-1]

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.gate.set()
        self.scheduler.close()
        self.thread.join(TIMEOUT_S)

    def ask_many(self, images: list[Any]) -> list[Any]:
        with self.door.channel(max_receive_message_length=-1) as channel:
            infer = channel.unary_unary(FAST_PATH)
            calls = [infer.future(request(image, str(i)), timeout=TIMEOUT_S) for i, image in enumerate(images)]
            return [image_of(call.result()) for call in calls]


@pytest.fixture
def site(make_door: Callable[..., Door]) -> Iterator[Site]:
    site = Site(make_door)
    yield site
    site.stop()


def image(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((1, *SHAPE), dtype=np.float32)


def request(array: Any, id: str = "", model: str = "image") -> bytes:
    return encode_request(model, "", id, [("X", "FP32", array.shape, array.tobytes())])


def image_of(response: bytes) -> Any:
    outputs = decode_response(response)[3]
    return np.frombuffer(outputs[0][3], np.float32).reshape(outputs[0][2])


def write_call(encoder: hpack.Encoder, stream_id: int, array: Any, model: str = "image", message: bytes = b"") -> bytes:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", FAST_PATH), (":authority", "x"), ("te", "trailers")]
    head = hyperframe.frame.HeadersFrame(stream_id, encoder.encode([*fields, ("content-type", "application/grpc")]))
    head.flags.add("END_HEADERS")
    message = message or request(array, model=model)
    body = b"\0" + len(message).to_bytes(4, "big") + message
    frames = [head.serialize()]
    for at in range(0, len(body), 16384):
        part = hyperframe.frame.DataFrame(stream_id, body[at : at + 16384])
        if at + 16384 >= len(body):
            part.flags.add("END_STREAM")
        frames.append(part.serialize())
    return b"".join(frames)


class RawClient:
    """One connection of plain frames: what is sent is cut as the test says."""

    def __init__(self, port: int, window: int = 1 << 30, receive_buffer_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(("127.0.0.1", port))
        self.encoder = hpack.Encoder()
        settings = hyperframe.frame.SettingsFrame(0)
        settings.settings = {hyperframe.frame.SettingsFrame.INITIAL_WINDOW_SIZE: window}
        update = hyperframe.frame.WindowUpdateFrame(0, window_increment=window).serialize()
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings.serialize() + update)
        self.data: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.stream = self.socket.makefile("rb")
        self.read_frame()  # the server's settings: with the answer to them its wide windows are in force
        answer = hyperframe.frame.SettingsFrame(0)
        answer.flags.add("ACK")
        self.socket.sendall(answer.serialize())

    def close(self) -> None:
        self.stream.close()
        self.socket.close()

    def ask(self, stream_id: int, array: Any) -> None:
        self.socket.sendall(write_call(self.encoder, stream_id, array))

    def read_frame(self) -> None:
        head = self.stream.read(9)
        payload = self.stream.read(int.from_bytes(head[:3], "big"))
        stream_id = int.from_bytes(head[5:], "big")
        if head[3] == 0:
            self.data[stream_id] = self.data.get(stream_id, b"") + payload
        if head[3] in (0, 1) and head[4] & 1:
            self.ended.add(stream_id)

    def answer(self, stream_id: int) -> Any:
        while stream_id not in self.ended:
            self.read_frame()
        return image_of(self.data[stream_id][5:])


def count(before: dict[str, int]) -> dict[str, int]:
    after = read_copied_bytes()
    return {where: after[where] - before[where] for where in after}


# ------------------------------------------------------------------------------------------------------ how often
def test_an_image_alone_is_not_copied(site: Site) -> None:
    """Between the socket and the model, and back: only what came with the headers, and the head of the answer."""
    client = site.connect()
    client.ask(1, image(0))
    assert (client.answer(1) == image(0)).all()  # from here on the door has greeted, and knows the frames
    for stream_id in (3, 5, 7):
        before = read_copied_bytes()
        client.ask(stream_id, image(stream_id))
        assert (client.answer(stream_id) == image(stream_id)).all()
        copied = count(before)
        assert copied["received"] <= FIRST_READ_BYTES
        assert copied["gathered"] == copied["encoded"] == 0
        assert copied["sent"] < 200
    assert site.flags == [(True, 0)] * 4


def test_the_images_of_a_batch_are_gathered_once(site: Site) -> None:
    site.gate.clear()
    clients = [site.connect() for _ in range(4)]
    clients[0].ask(1, image(0))
    wait_until(lambda: site.scheduler.in_flight == 1 and site.scheduler.pending == 0, "the first batch")
    before = read_copied_bytes()
    for number, client in enumerate(clients[1:], 1):
        client.ask(1, image(number))
    wait_until(lambda: site.scheduler.pending == 3, "a batch of three")
    site.gate.set()
    for number, client in enumerate(clients):
        assert (client.answer(1) == image(number)).all()
    copied = count(before)
    assert site.sizes == [1, 3]
    assert copied["gathered"] == 3 * IMAGE_BYTES
    assert copied["encoded"] == 0
    assert copied["received"] <= 3 * FIRST_READ_BYTES
    assert copied["sent"] < 800


def test_a_compiled_echo_is_not_copied_either(make_door: Callable[..., Door]) -> None:
    site = Site(make_door, is_compiled=True)
    try:
        client = site.connect()
        client.ask(1, image(0))
        assert (client.answer(1) == image(0)).all()
        before = read_copied_bytes()
        client.ask(3, image(3))
        assert (client.answer(3) == image(3)).all()
        copied = count(before)
        assert copied["received"] <= FIRST_READ_BYTES
        assert copied["gathered"] == copied["encoded"] == 0
        assert copied["sent"] < 200
        images = [image(seed) for seed in range(12)]
        with ThreadPoolExecutor(4) as pool:
            for answers in pool.map(site.ask_many, [images] * 4):
                for given, got in zip(images, answers, strict=True):
                    assert (got == given).all()
        assert count(before)["encoded"] == 0
    finally:
        site.stop()


# ------------------------------------------------------------------------------------------------- never a wrong answer
def make_fresh() -> Model:
    return lambda inputs: {"Y": inputs["X"] + 1}


def make_reusing() -> Model:
    """Writes each answer into the same array."""
    memory = np.empty((8, *SHAPE), np.float32)

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        rows = len(inputs["X"])
        np.add(inputs["X"], 1, out=memory[:rows])
        return {"Y": memory[:rows]}

    return run


def make_spoiling() -> Model:
    """Keeps what it gave and writes into it when it is called again."""
    kept: list[Any] = []

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        for array in kept:
            array[:] = -1
        result = {"Y": inputs["X"] + 1}
        kept[:] = [result["Y"]]
        return result

    return run


def make_keeping_mapping() -> Model:
    """The same, through the mapping."""
    result: dict[str, Any] = {}

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if result:
            result["Y"][:] = -1
        result["Y"] = inputs["X"] + 1
        return result

    return run


def make_keeping_inputs() -> Model:
    """Spoils the arrays that it was given before, of which the answers were parts."""
    kept: list[Any] = []

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        for array in kept:
            array[:] = -1
        inputs["X"][:] += 1
        kept[:] = [inputs["X"]]
        return {"Y": inputs["X"][:]}

    return run


@pytest.mark.parametrize(
    ("make_model", "is_lent"),
    [
        (make_fresh, True),
        (make_reusing, False),
        (make_spoiling, False),
        (make_keeping_mapping, False),
        (make_keeping_inputs, False),
    ],
)
def test_answers_are_right_whatever_the_model_keeps(site: Site, make_model: Callable[[], Model], is_lent: bool) -> None:
    site.model = make_model()
    images = [image(seed) for seed in range(12)]
    before = read_copied_bytes()
    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(site.ask_many, [images] * 4):
            for given, got in zip(images, answers, strict=True):
                assert (got == given + 1).all()
    encoded = count(before)["encoded"]
    assert encoded == (0 if is_lent else 48 * IMAGE_BYTES)


def test_a_slow_reader_gets_what_was_lent_to_it(site: Site) -> None:
    """The socket is full in the middle of an array; other batches run before the rest is written."""
    slow = site.connect(receive_buffer_bytes=65536)
    for number in range(12):
        slow.ask(2 * number + 1, image(number))
    assert (site.ask_many([image(99)])[0] == image(99)).all()
    for number in range(12):
        assert (slow.answer(2 * number + 1) == image(number)).all()


def test_loans_come_back_when_the_client_goes(site: Site) -> None:
    clients = [site.connect(window=65535 + 1000 * number) for number in range(4)]
    for client in clients:
        client.ask(1, image(1))
    wait_until(lambda: len(site.sizes) and sum(site.sizes) == 4, "the batches")
    wait_until(lambda: site.scheduler.in_flight == 0, "the answers")
    assert loans.read_lent_bytes() > 0
    for client in clients:
        client.close()

    def is_returned() -> bool:
        loans.return_all()
        return bool(loans.read_lent_bytes() == 0)

    wait_until(is_returned, "the end of all loans")
    assert (site.ask_many([image(2)])[0] == image(2)).all()


def test_too_much_on_loan_is_copied(site: Site) -> None:
    """Clients that do not read may hold 64 MB of arrays; what comes then is copied as ever."""
    idle = site.connect(window=1000)
    for number in range(130):
        idle.ask(2 * number + 1, image(1))
    wait_until(lambda: sum(site.sizes) == 130 and site.scheduler.in_flight == 0, "the answers")
    assert loans.read_lent_bytes() <= 64 << 20
    assert (site.ask_many([image(2)])[0] == image(2)).all()
    with pytest.raises(grpc.RpcError):
        site.door.channel().unary_unary(FAST_PATH)(b"\xff", timeout=TIMEOUT_S)


def test_what_a_full_socket_holds_up_is_on_the_books(site: Site) -> None:
    """Answers that come while the socket is full are collected by nobody, but they take memory."""
    site.model = lambda inputs: {"Y": inputs["X"] + 1}
    site.gate.clear()
    slow = site.connect(receive_buffer_bytes=65536)
    for number in range(64):
        slow.ask(2 * number + 1, image(1))
    wait_until(lambda: site.scheduler.in_flight == 64, "the requests")
    site.gate.set()
    wait_until(lambda: site.scheduler.in_flight == 0, "the answers")
    ledger = site.door.server.ledger
    wait_until(lambda: ledger.bytes > 64 * IMAGE_BYTES * 2 // 3, "the answers in the books")
    slow.close()
    wait_until(lambda: ledger.bytes == 0, "empty books")


def test_a_loan_counts_all_the_memory_that_it_keeps(site: Site) -> None:
    """A part of a big array keeps the whole: a client that does not read could hold any amount."""
    site.model = lambda inputs: {"Y": np.zeros((64, *SHAPE), np.float32)[: len(inputs["X"])]}
    idle = site.connect(window=1000)
    for number in range(8):
        idle.ask(2 * number + 1, image(1))
        wait_until(lambda: sum(site.sizes) > number and site.scheduler.in_flight == 0, "the answer")  # noqa: B023
    assert loans.read_lent_bytes() >= 64 * IMAGE_BYTES
    assert loans.read_lent_bytes() <= 64 << 20
