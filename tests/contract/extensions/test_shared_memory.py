"""System shared memory with tritonclient's own library, over gRPC, streams and HTTP; and clients that mean harm."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import TIMEOUT_S, Site
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
from tritonclient.utils import shared_memory as shm

from aiorch_server.errors import CapacityError
from aiorch_server.exchange import Exchange, SharedRegions
from aiorch_server.exchange.regions import OpenRegion
from aiorch_server.types import InferenceRequest, ModelSignature, Tensor

LIBRARIES = {"grpc": grpc_client, "http": http_client}
NOWHERE = "Unable to find shared memory region: 'nowhere'"
VALUES = np.arange(8, dtype=np.float32).reshape(2, 4)


@contextmanager
def connect(site: Site, door: str) -> Iterator[Any]:
    client = LIBRARIES[door].InferenceServerClient(site.target if door == "grpc" else site.http)
    try:
        yield client
    finally:
        client.unregister_system_shared_memory()
        client.close()


@pytest.fixture(params=LIBRARIES)
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(site: Site, door: str) -> Iterator[Any]:
    with connect(site, door) as opened:
        yield opened


@pytest.fixture
def region(new_key: Callable[[str], str]) -> Iterator[Callable[..., Any]]:
    """Makes shared memory objects of the client."""
    with ExitStack() as stack:

        def make(name: str, size: int) -> tuple[str, Any]:
            handle = shm.create_shared_memory_region(name, new_key(name), size, create_only=True)
            stack.callback(shm.destroy_shared_memory_region, handle)
            return new_key(name), handle

        yield make


def place_input(door: str, region: str, size: int, offset: int = 0, shape: Any = (2, 4), datatype: str = "FP32") -> Any:
    tensor = LIBRARIES[door].InferInput("INPUT0", list(shape), datatype)
    tensor.set_shared_memory(region, size, offset)
    return tensor


def place_output(door: str, region: str, size: int, offset: int = 0) -> Any:
    output = LIBRARIES[door].InferRequestedOutput("OUTPUT0")
    output.set_shared_memory(region, size, offset)
    return output


def send_input(door: str, values: np.ndarray = VALUES) -> Any:
    tensor = LIBRARIES[door].InferInput("INPUT0", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values)
    return tensor


def refuse(call: Callable[[], Any], code: str, text: str) -> None:
    """``code`` is gRPC's; HTTP's follows from it."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    http = {"NOT_FOUND": "404", "UNIMPLEMENTED": "501", "UNAVAILABLE": "503", "RESOURCE_EXHAUSTED": "413"}
    assert caught.value.status() in (f"StatusCode.{code}", http.get(code, "400"))
    assert text in caught.value.message(), caught.value.message()


def count_descriptors() -> int:
    """How many objects of these tests the process holds open."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(entry.readlink()))
    return sum(f"aiorch_test_{os.getpid()}_server" in link for link in links)


def test_register_status_unregister(client: Any, door: str, region: Any) -> None:
    first, _ = region("first", 4096)
    client.register_system_shared_memory("first", first, 64)
    client.register_system_shared_memory("second", first, 32, offset=100)
    listed = client.get_system_shared_memory_status(**({"as_json": True} if door == "grpc" else {}))
    regions = sorted(listed["regions"].values() if door == "grpc" else listed, key=lambda each: each["name"])
    found = [(each["name"], each["key"], int(each.get("offset", 0)), int(each["byte_size"])) for each in regions]
    assert found == [("first", first, 0, 64), ("second", first, 100, 32)]
    refuse(
        lambda: client.register_system_shared_memory("first", first, 8),
        "ALREADY_EXISTS",
        "shared memory region 'first' already in manager",
    )
    client.unregister_system_shared_memory("first")
    refuse(
        lambda: client.get_system_shared_memory_status("first"),
        "NOT_FOUND",
        "Unable to find system shared memory region: 'first'",
    )
    client.unregister_system_shared_memory("first")  # no error, as in Triton
    client.unregister_system_shared_memory()
    assert "second" not in str(client.get_system_shared_memory_status())


@pytest.mark.proves("SystemSharedMemoryRegister", "ModelInfer", by=("tritonclient.grpc", "tritonclient.http"))
def test_inputs_and_outputs(client: Any, door: str, region: Any) -> None:
    """Both in one object at offsets; only the named output's place is written."""
    name, handle = region("both", 4096)
    shm.set_shared_memory_region(handle, [VALUES], offset=128)
    shm.set_shared_memory_region(handle, [np.full(256, 7, dtype=np.uint8)], offset=1024)
    client.register_system_shared_memory("in", name, 512, offset=64)
    client.register_system_shared_memory("out", name, 1024, offset=1024)
    result = client.infer("identity", [place_input(door, "in", 32, 64)], outputs=[place_output(door, "out", 64, 16)])
    output = result.get_output("OUTPUT0")
    shape = list(output["shape"] if door == "http" else output.shape)
    assert shape == [2, 4]
    # over HTTP parameters would promise binary data to Triton's C++ client
    parameters = output.get("parameters", {}) if door == "http" else dict(output.parameters)
    told = {"shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"}
    assert set(parameters) == (set() if door == "http" else told)
    assert (shm.get_contents_as_numpy(handle, np.float32, shape, 1024 + 16) == VALUES).all()
    around = shm.get_contents_as_numpy(handle, np.uint8, [256], 1024)
    assert (around[:16] == 7).all() and (around[16 + 32 :] == 7).all()


def test_bytes(client: Any, door: str, region: Any) -> None:
    name, handle = region("text", 4096)
    words = serialize_byte_tensor(np.array([b"a", b"", "grün".encode()], dtype=object))
    shm.set_shared_memory_region(handle, [words])
    size = len(words.item())
    client.register_system_shared_memory("text", name, 4096)
    client.infer(
        "text",
        [place_input(door, "text", size, shape=(3,), datatype="BYTES")],
        outputs=[place_output(door, "text", 100, 2048)],
    )
    assert shm.get_contents_as_numpy(handle, np.object_, [3], 2048).tolist() == [b"a", b"", "grün".encode()]


def test_big_tensors(client: Any, door: str, region: Any) -> None:
    """Beyond what is copied on the event loop."""
    values = np.arange(600_000, dtype=np.float32).reshape(2, -1)
    name, handle = region("big", 2 * values.nbytes)
    shm.set_shared_memory_region(handle, [values])
    client.register_system_shared_memory("big", name, 2 * values.nbytes)
    size = values.nbytes
    client.infer(
        "identity",
        [place_input(door, "big", size, shape=values.shape)],
        outputs=[place_output(door, "big", size, size)],
    )
    assert (shm.get_contents_as_numpy(handle, np.float32, values.shape, size) == values).all()


@pytest.mark.proves("ModelStreamInfer", by="tritonclient.grpc")
def test_stream(site: Site, region: Any) -> None:
    """Good and bad ones through one stream; each answer keeps its place."""
    name, handle = region("stream", 256)
    shm.set_shared_memory_region(handle, [VALUES])
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with connect(site, "grpc") as client:
        client.register_system_shared_memory("stream", name, 256)
        client.start_stream(lambda result, error: answers.put((result, error)))
        for source in ("stream", "nowhere", "stream"):
            client.async_stream_infer(
                "identity", [place_input("grpc", source, 32)], outputs=[place_output("grpc", "stream", 32, 128)]
            )
        found = [answers.get(timeout=TIMEOUT_S) for _ in range(3)]
        client.stop_stream()
    assert [error is None for _, error in found] == [True, False, True]
    assert NOWHERE in str(found[1][1])
    assert (shm.get_contents_as_numpy(handle, np.float32, [2, 4], 128) == VALUES).all()


@pytest.mark.parametrize(
    ("name", "key", "offset", "size", "code", "text"),
    [
        ("r", "/aiorch_test_absent", 0, 8, "NOT_FOUND", "Unable to open shared memory region: '/aiorch_test_absent'"),
        ("r", "", 0, 8, "INVALID_ARGUMENT", "cannot register shared memory region 'r' - invalid shm key ''"),
        ("r", "///", 0, 8, "INVALID_ARGUMENT", "invalid shm key '///'"),
        ("r", "/..", 0, 8, "INVALID_ARGUMENT", "invalid shm key '/..'"),
        ("r", "/.", 0, 8, "INVALID_ARGUMENT", "invalid shm key '/.'"),
        ("r", "/../etc/passwd", 0, 8, "INVALID_ARGUMENT", "invalid shm key"),
        ("r", "/folder/object", 0, 8, "INVALID_ARGUMENT", "invalid shm key"),
        ("r", "/nul\0behind", 0, 8, "INVALID_ARGUMENT", "invalid shm key"),
        ("r", "/" + "x" * 256, 0, 8, "INVALID_ARGUMENT", "invalid shm key"),
        ("r", "/" + "ü" * 128, 0, 8, "INVALID_ARGUMENT", "invalid shm key"),
        (
            "r",
            "/triton_python_backend_shm_region_1",
            0,
            8,
            "INVALID_ARGUMENT",
            "as the key contains the reserved prefix",
        ),
        ("r", "//triton_python_backend_shm_region_1", 0, 8, "INVALID_ARGUMENT", "'triton_python_backend_shm_region_'"),
        ("x" * 1025, None, 0, 8, "INVALID_ARGUMENT", "': invalid args"),
        ("r", None, 0, 0, "INVALID_ARGUMENT", "failed to register shared memory region 'r': invalid args"),
        ("r", None, 0, 4097, "INVALID_ARGUMENT", "failed to register shared memory region 'r': invalid args"),
        ("r", None, 4096, 1, "INVALID_ARGUMENT", "failed to register shared memory region 'r': invalid args"),
        ("r", None, 2**64 - 8, 8, "INVALID_ARGUMENT", "failed to register shared memory region 'r': invalid args"),
        ("r", None, 0, 9 << 20, "RESOURCE_EXHAUSTED", "expected at most 8388608"),
    ],
)
def test_registrations_that_are_refused(
    client: Any, region: Any, name: str, key: str | None, offset: int, size: int, code: str, text: str
) -> None:
    real, _ = region("refused", 4096)
    refuse(
        lambda: client.register_system_shared_memory(name, key if key is not None else real, size, offset), code, text
    )


def test_no_links_folders_or_pipes(client: Any, new_key: Callable[[str], str]) -> None:
    """Only the object itself: a link could lead anywhere, a pipe would block, a folder is none."""
    secret = Path("/dev/shm", new_key("secret")[1:])
    secret.write_bytes(b"x" * 64)
    link, pipe, folder = (Path("/dev/shm", new_key(kind)[1:]) for kind in ("link", "pipe", "folder"))
    link.symlink_to(secret)
    os.mkfifo(pipe)
    folder.mkdir()
    try:
        for path, text in ((link, "Unable to open"), (pipe, "invalid args"), (folder, "Unable to open")):
            code = "NOT_FOUND" if text == "Unable to open" else "INVALID_ARGUMENT"
            refuse(lambda path=path: client.register_system_shared_memory("r", f"/{path.name}", 8), code, text)
    finally:
        folder.rmdir()


@pytest.mark.parametrize(
    ("size", "offset", "code", "text"),
    [
        (32, 4096, "INVALID_ARGUMENT", "Invalid offset for shared memory region: 'r'"),
        (32, -1, "INVALID_ARGUMENT", "Invalid offset for shared memory region: 'r'"),
        (32, 4080, "INVALID_ARGUMENT", "Invalid offset + byte size for shared memory region: 'r'"),
        (2**63 - 1, 8, "INVALID_ARGUMENT", "Invalid offset + byte size for shared memory region: 'r'"),
        (-1, 0, "INVALID_ARGUMENT", "Invalid offset + byte size for shared memory region: 'r'"),
    ],
)
def test_places_outside_the_region(
    client: Any, door: str, region: Any, size: int, offset: int, code: str, text: str
) -> None:
    name, _ = region("outside", 4096)
    client.register_system_shared_memory("r", name, 4096)
    refuse(lambda: client.infer("identity", [place_input(door, "r", size, offset)]), code, text)
    outputs = [place_output(door, "r", size, offset)]
    refuse(lambda: client.infer("identity", [send_input(door)], outputs=outputs), code, text)


def test_requests_that_do_not_fit(client: Any, door: str, region: Any) -> None:
    name, _ = region("sizes", 4096)
    client.register_system_shared_memory("r", name, 4096)
    text = "input byte size mismatch for input 'INPUT0' for model 'identity'. Expected 32, got 36"
    refuse(lambda: client.infer("identity", [place_input(door, "r", 36)]), "INVALID_ARGUMENT", text)
    outputs = [place_output(door, "r", 31)]
    text = "shared memory size specified with the request for output 'OUTPUT0' (31 bytes) should be at least 32 bytes"
    refuse(lambda: client.infer("identity", [send_input(door)], outputs=outputs), "INVALID_ARGUMENT", text)
    refuse(lambda: client.infer("identity", [place_input(door, "nowhere", 32)]), "NOT_FOUND", NOWHERE)
    outputs = [place_output(door, "nowhere", 32)]
    refuse(lambda: client.infer("identity", [send_input(door)], outputs=outputs), "NOT_FOUND", NOWHERE)
    refuse(lambda: client.infer("nobody", [place_input(door, "r", 32)]), "INVALID_ARGUMENT", "unknown model: 'nobody'")


def test_text_that_is_cut(client: Any, door: str, region: Any) -> None:
    """Lengths inside a region are the client's words: nothing behind the tensor is read."""
    name, handle = region("cut", 64)
    shm.set_shared_memory_region(handle, [np.array([1000], dtype=np.uint32)])
    client.register_system_shared_memory("r", name, 64)
    tensor = place_input(door, "r", 16, shape=(1,), datatype="BYTES")
    refuse(lambda: client.infer("text", [tensor]), "INVALID_ARGUMENT", "incomplete string data for inference input")


@pytest.mark.parametrize("size", [4096, 4 << 20])
def test_an_object_that_shrinks(client: Any, door: str, region: Any, size: int) -> None:
    """After its registration: the one who would touch a mapping of it dies of SIGBUS."""
    name, _ = region("shrunk", size)
    client.register_system_shared_memory("r", name, size)
    os.truncate(f"/dev/shm{name}", 16)
    shape = (1, size // 4)
    text = f"the object '{name}' behind shared memory region 'r' has become smaller than the region"
    tensor = place_input(door, "r", size, shape=shape)
    refuse(lambda: client.infer("identity", [tensor]), "INVALID_ARGUMENT", text)
    outputs, sent = [place_output(door, "r", size)], send_input(door, np.zeros(shape, np.float32))
    refuse(lambda: client.infer("identity", [sent], outputs=outputs), "INVALID_ARGUMENT", text)
    assert Path(f"/dev/shm{name}").stat().st_size == 16
    assert (client.infer("identity", [send_input(door)]).as_numpy("OUTPUT0") == VALUES).all()


def test_unregister_during_a_request(client: Any, site: Site, door: str, region: Any) -> None:
    """The request keeps its region, whose descriptor goes with the last who needs it; the name is free at once."""
    name, handle = region("server_during", 4096)
    shm.set_shared_memory_region(handle, [VALUES[:1]])
    before = count_descriptors()
    client.register_system_shared_memory("r", name, 4096)
    assert count_descriptors() == before + 1
    done: list[Any] = []

    def wait_at_the_gate() -> None:
        with connect(site, door) as other:
            tensors = [place_input(door, "r", 16, shape=(1, 4))]
            done.append(other.infer("gate", tensors, outputs=[place_output(door, "r", 16, 1024)]))

    waiting = threading.Thread(target=wait_at_the_gate)
    waiting.start()
    wait_until(lambda: site.count_pending() == 1)
    client.unregister_system_shared_memory("r")
    refuse(lambda: client.infer("identity", [place_input(door, "r", 16, shape=(1, 4))]), "NOT_FOUND", "'r'")
    client.register_system_shared_memory("r", name, 8, offset=8)
    assert count_descriptors() == before + 2
    client.infer("gate", [send_input(door, VALUES[:1])])
    waiting.join(TIMEOUT_S)
    assert len(done) == 1
    assert (shm.get_contents_as_numpy(handle, np.float32, [1, 4], 1024) == VALUES[:1]).all()
    client.unregister_system_shared_memory()
    wait_until(lambda: count_descriptors() == before)


def test_the_number_of_regions_is_bounded(client: Any, region: Any) -> None:
    name, _ = region("many", 64)
    for number in range(16):
        client.register_system_shared_memory(f"r{number}", name, 1)
    text = "16 shared memory regions are registered, which is the most"
    refuse(lambda: client.register_system_shared_memory("one more", name, 1), "RESOURCE_EXHAUSTED", text)


def test_copies_are_bounded_together() -> None:
    regions = SharedRegions("on", max_bytes=100)
    booking = regions.take_copied(60)
    with pytest.raises(Exception, match="expected at most 100; try again later"):
        regions.take_copied(41)
    del booking
    assert regions.take_copied(100) is not None
    assert regions.count_copied() == 0


async def test_a_copy_is_counted_until_nobody_has_it(region: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is given up leaves a thread that copies, and a model that computes with what was copied."""
    name, _ = region("counted", size := 1 << 21)
    regions = SharedRegions("on", max_bytes=size)
    regions.register("r", name, 0, size)
    place = {"shared_memory_region": "r", "shared_memory_byte_size": size}
    request = InferenceRequest("m", "", [Tensor("X", "UINT8", (size,), None, place)])
    started, may_end, read = threading.Event(), threading.Event(), OpenRegion.read
    kept: list[Any] = []

    def read_slowly(*arguments: Any) -> Any:
        started.set()
        assert may_end.wait(TIMEOUT_S)
        return read(*arguments)

    async def use() -> None:
        with Exchange(regions, request, ModelSignature((), (), 0)) as exchange:
            kept.append((await exchange.bring()).inputs[0].data)
            await asyncio.get_running_loop().create_future()

    async def start_and_cancel(condition: Callable[[], bool]) -> None:
        task = asyncio.create_task(use())
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])

    monkeypatch.setattr(OpenRegion, "read", read_slowly)
    await start_and_cancel(started.is_set)
    with pytest.raises(CapacityError):  # the thread still copies
        regions.take_copied(1)
    may_end.set()
    await asyncio.to_thread(wait_until, lambda: regions.count_copied() == 0)
    await start_and_cancel(lambda: bool(kept))
    with pytest.raises(CapacityError):  # a model may still have it
        regions.take_copied(1)
    kept.clear()
    assert regions.count_copied() == 0


def test_switched_off(open_site: Callable[..., Site], door: str, region: Any) -> None:
    """The default: nothing can be registered or used; who tidies up beforehand gets no error."""
    name, _ = region("off", 64)
    with connect(open_site(), door) as client:
        text = "Client shared memory is disabled."
        refuse(lambda: client.register_system_shared_memory("r", name, 8), "UNIMPLEMENTED", text)
        refuse(lambda: client.infer("identity", [place_input(door, "r", 32)]), "UNIMPLEMENTED", text)
        client.unregister_system_shared_memory()
        assert "system_shared_memory" not in str(client.get_server_metadata())


def test_a_prefix_of_keys(open_site: Callable[..., Site], door: str, region: Any) -> None:
    name, _ = region("prefixed", 64)
    other, _ = region("other", 64)
    with connect(open_site(shared_memory={"keys": name[:-2]}), door) as client:
        client.register_system_shared_memory("r", name, 8)
        text = f"this server allows keys that start with '{name[:-2]}' only"
        refuse(lambda: client.register_system_shared_memory("o", other, 8), "INVALID_ARGUMENT", text)
        refuse(lambda: client.register_system_shared_memory("o", f"/x{name}", 8), "INVALID_ARGUMENT", "invalid shm key")
        assert "system_shared_memory" in str(client.get_server_metadata())


@pytest.mark.proves("CudaSharedMemory*", by=("tritonclient.grpc", "tritonclient.http"))
def test_cuda(client: Any, door: str) -> None:
    text = "this server has no GPU"
    refuse(lambda: client.register_cuda_shared_memory("r", b"aGFuZGxl", 0, 64), "UNAVAILABLE", text)
    text = "Unable to find cuda shared memory region: 'r'"
    refuse(lambda: client.get_cuda_shared_memory_status("r"), "NOT_FOUND", text)
    assert not client.get_cuda_shared_memory_status(**({"as_json": True} if door == "grpc" else {}))
    client.unregister_cuda_shared_memory("r")
    client.unregister_cuda_shared_memory()


def wait_until(is_true: Callable[[], bool]) -> None:
    """Polls with a deadline."""
    turn = threading.Event()
    for _ in range(int(TIMEOUT_S / 0.01)):
        if is_true():
            return
        turn.wait(0.01)
    raise AssertionError("never came")
