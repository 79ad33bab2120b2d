"""What clients match on when a request is refused: for each situation a status and a text, the same at every door."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import TIMEOUT_S, Site
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from aiorch_server.types import InferenceRequest, Tensor

FP32 = 'input { name: "A" data_type: TYPE_FP32 dims: [16] } output { name: "X" data_type: TYPE_FP32 dims: [16] }'
PAIR = """
    input [{ name: "A" data_type: TYPE_FP32 dims: [16] }, { name: "B" data_type: TYPE_FP32 dims: [16] }@]
    output [{ name: "X" data_type: TYPE_FP32 dims: [16] }, { name: "Y" data_type: TYPE_FP32 dims: [16] }]"""
OPTIONAL = ', { name: "C" data_type: TYPE_FP32 dims: [16] optional: true }'
CONTROL = 'control_input { name: "START" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }'
MODELS = {
    "pair": f'backend: "identity" max_batch_size: 8 {PAIR.replace("@", "")}',
    "some": f'backend: "python" max_batch_size: 8 {PAIR.replace("@", OPTIONAL)}',
    # two requests have to come together; one place in the queue
    "gate": f"""backend: "identity" max_batch_size: 2 {FP32} dynamic_batching {{
        preferred_batch_size: [2] max_queue_delay_microseconds: 60000000
        default_queue_policy {{ allow_timeout_override: true }} }}""",
    "full": f"""backend: "identity" max_batch_size: 2 {FP32} dynamic_batching {{
        preferred_batch_size: [2] max_queue_delay_microseconds: 60000000
        default_queue_policy {{ max_queue_size: 1 }} }}""",
    "steps": f'backend: "python" max_batch_size: 8 {FP32} sequence_batching {{ {CONTROL} }}',
    "many": f'backend: "python" model_transaction_policy {{ decoupled: true }} {FP32}',
    "gone": f'backend: "identity" {FP32}',
    "broken": f'backend: "nobody" {FP32}',
}
CODE = "class Model:\n    def execute(self, inputs):\n        return {'X': inputs['A'], 'Y': inputs['A']}\n"
TRITON_CODE = "class TritonPythonModel:\n    def execute(self, requests):\n        return None\n"
HTTP = {"INTERNAL": "500", "NOT_FOUND": "404", "UNAVAILABLE": "503", "UNIMPLEMENTED": "501"}
DOORS = ("native", "grpcio", "rest")
CORE = "[request id: q] "
MISSING = "Request for unknown model: "


@dataclass
class Door:
    """tritonclient at one door; ``key`` is a shared memory object of 64 bytes."""

    site: Site
    library: Any
    client: Any
    key: str

    def infer(
        self, model: str = "pair", inputs: Any = ("A", "B"), *, outputs: tuple[str, ...] = (), **options: Any
    ) -> Any:
        tensors = [each if not isinstance(each, str) else self.fill(each) for each in inputs]
        wanted = [self.library.InferRequestedOutput(name) for name in outputs] or None
        return self.client.infer(model, tensors, outputs=wanted, **{"request_id": "q"} | options)

    def fill(self, name: str, shape: tuple[int, ...] = (1, 16), datatype: str = "FP32", told: Any = None) -> Any:
        """An input of ones; ``told`` is another shape than it has."""
        tensor = self.library.InferInput(name, list(shape), datatype)
        tensor.set_data_from_numpy(np.ones(shape, {"FP32": np.float32, "INT32": np.int32}[datatype]))
        return tensor if told is None else tensor.set_shape(list(told))

    def place(self, region: str, size: int, offset: int = 0) -> list[Any]:
        tensor = self.library.InferInput("A", [1, 16], "FP32")
        tensor.set_shared_memory(region, size, offset)
        return [tensor, "B"]

    def register(self, name: str, size: int, key: str = "") -> None:
        self.client.register_system_shared_memory(name, key or self.key, size)


def fill_queue(door: Door) -> None:
    """A second request to a queue of one; the first is given up."""
    call = None
    with grpc_client.InferenceServerClient(door.site.target) as other:
        tensor = grpc_client.InferInput("A", [1, 16], "FP32").set_data_from_numpy(np.ones((1, 16), np.float32))
        call = other.async_infer("full", [tensor], lambda result, error: None)
        try:
            wait_until(lambda: door.site.count_pending("full") == 1)
            door.infer("full", ["A"])
        finally:
            call.cancel()
            wait_until(lambda: door.site.count_pending("full") == 0)


def register_twice(door: Door) -> None:
    door.register("twice", 64)
    door.register("twice", 64)


def reach_out(door: Door) -> None:
    door.register("small", 64)
    door.infer(inputs=door.place("small", 64, 8))


#: Situation: what is done, status, text (its beginning, or all of it where it ends with ``$``).
ROWS: dict[str, tuple[Callable[[Door], Any], str, str]] = {
    "unknown model": (lambda d: d.infer("nobody"), "INVALID_ARGUMENT", MISSING + "'nobody' is not found$"),
    "unknown model, metadata": (
        lambda d: d.client.get_model_metadata("nobody"),
        *("INVALID_ARGUMENT", MISSING + "'nobody' is not found$"),
    ),
    "unknown version": (
        lambda d: d.infer(model_version="9"),
        *("NOT_FOUND", MISSING + "'pair' version 9 is not found$"),
    ),
    "no version": (lambda d: d.infer("gone", ["A"]), "NOT_FOUND", MISSING + "'gone' has no available versions$"),
    "version not ready": (
        lambda d: d.infer("gone", ["A"], model_version="1"),
        *("UNAVAILABLE", MISSING + "'gone' version 1 is not at ready state$"),
    ),
    "statistics, unknown model": (
        lambda d: d.client.get_inference_statistics("nobody"),
        *("INVALID_ARGUMENT", "requested model 'nobody' is not available$"),
    ),
    "statistics, unknown version": (
        lambda d: d.client.get_inference_statistics("pair", "9"),
        *("INVALID_ARGUMENT", "requested model version is not available for model 'pair'$"),
    ),
    "wrong shape": (
        lambda d: d.infer(inputs=[d.fill("A", (1, 15)), "B"]),
        "INVALID_ARGUMENT",
        CORE
        + "unexpected shape for input 'A' for model 'pair'. Expected [-1,16], got [1,15]. NOTE: this model batches "
        "(max_batch_size > 0), so each input carries the batch dimension in front of the dims of its configuration.$",
    ),
    "wrong dtype": (
        lambda d: d.infer(inputs=[d.fill("A", datatype="INT32"), "B"]),
        "INVALID_ARGUMENT",
        CORE + "inference input 'A' data-type is 'INT32', but model 'pair' expects 'FP32'$",
    ),
    "byte size": (
        lambda d: d.infer(inputs=[d.fill("A", (2, 16), told=(1, 16)), "B"]),
        "INVALID_ARGUMENT",
        CORE + "input byte size mismatch for input 'A' for model 'pair'. Expected 64, got 128$",
    ),
    "missing input": (
        lambda d: d.infer(inputs=["A"]),
        "INVALID_ARGUMENT",
        CORE + "expected 2 inputs but got 1 inputs for model 'pair'. Got input(s) ['A'], but missing required input(s) "
        "['B']. Please provide all required input(s).$",
    ),
    "missing input beside optional ones": (
        lambda d: d.infer("some", ["A"]),
        "INVALID_ARGUMENT",
        CORE + "expected number of inputs between 2 and 3 but got 1 inputs for model 'some'. Got input(s) ['A'], but "
        "missing required input(s) ['B']. Please provide all required input(s).$",
    ),
    "extra input": (
        lambda d: d.infer(inputs=["A", "B", "Z"]),
        *("INVALID_ARGUMENT", CORE + "unexpected inference input 'Z' for model 'pair'$"),
    ),
    "extra output": (
        lambda d: d.infer(outputs=("Z",)),
        *("INVALID_ARGUMENT", CORE + "unexpected inference output 'Z' for model 'pair'$"),
    ),
    "batch too big": (
        lambda d: d.infer(inputs=[d.fill("A", (9, 16)), d.fill("B", (9, 16))]),
        *("INVALID_ARGUMENT", CORE + "inference request batch-size must be <= 8 for 'pair'$"),
    ),
    "no request id": (
        lambda d: d.infer(outputs=("Z",), request_id=""),
        *("INVALID_ARGUMENT", "[request id: <id_unknown>] unexpected inference output 'Z' for model 'pair'$"),
    ),
    "queue full": (fill_queue, "UNAVAILABLE", CORE + "Exceeds maximum queue size$"),
    "queue timeout": (
        lambda d: d.infer("gate", ["A"], timeout=1000),
        *("UNAVAILABLE", CORE + "Request timeout expired$"),
    ),
    "sequence without START": (
        lambda d: d.infer("steps", ["A"], sequence_id=7),
        "INVALID_ARGUMENT",
        CORE + "inference request for sequence 7 to model 'steps' must specify the START flag on the first request of "
        "the sequence$",
    ),
    "load fails, no such model": (
        lambda d: d.client.load_model("nobody"),
        *("INTERNAL", "failed to load 'nobody', failed to poll from model repository$"),
    ),
    "load fails": (
        lambda d: d.client.load_model("broken"),
        *("INVALID_ARGUMENT", "load failed for model 'broken': version 1: "),
    ),
    "shm, no region": (
        lambda d: d.infer(inputs=d.place("nowhere", 64)),
        *("NOT_FOUND", CORE + "Unable to find shared memory region: 'nowhere'$"),
    ),
    "shm, status of no region": (
        lambda d: d.client.get_system_shared_memory_status("nowhere"),
        *("NOT_FOUND", "Unable to find system shared memory region: 'nowhere'$"),
    ),
    "shm, registered": (
        register_twice,
        *("ALREADY_EXISTS", "shared memory region 'twice' already in manager$"),
    ),
    "shm, out of the region": (
        reach_out,
        *("INVALID_ARGUMENT", CORE + "Invalid offset + byte size for shared memory region: 'small'$"),
    ),
    "shm, larger than the object": (
        lambda d: d.register("large", 4096),
        *("INVALID_ARGUMENT", "failed to register shared memory region 'large': invalid args"),
    ),
    "shm, reserved": (
        lambda d: d.register("r", 64, "/triton_python_backend_shm_region_1"),
        "INVALID_ARGUMENT",
        "cannot register shared memory region 'r' with key '/triton_python_backend_shm_region_1' as the key contains "
        "the reserved prefix 'triton_python_backend_shm_region_'",
    ),
}
#: What only one of the protocols can say.
GRPC_ROWS: dict[str, tuple[Callable[[Door], Any], str, str]] = {
    "bad version string": (
        lambda d: d.infer(model_version="last"),
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string 'last' (details: ",
    ),
    "decoupled on unary": (
        lambda d: d.infer("many", ["A"]),
        *("UNIMPLEMENTED", "ModelInfer RPC doesn't support models with decoupled transaction policy$"),
    ),
}


def send_contents(door: Door, raw: list[bytes], typed: list[float]) -> None:
    """By bare messages: tritonclient cannot be brought to do it."""
    request = pb.ModelInferRequest(model_name="pair", id="q", raw_input_contents=raw)
    for name in ("A", "B"):
        request.inputs.add(name=name, datatype="FP32", shape=[1, 16])
    if typed:
        request.inputs[0].contents.fp32_contents.extend(typed)
    try:
        door.client._client_stub.ModelInfer(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        raise InferenceServerException(error.details(), str(error.code())) from error


GRPC_ROWS |= {
    "both kinds of data": (
        lambda d: send_contents(d, [bytes(64)] * 2, [1.0] * 16),
        "INVALID_ARGUMENT",
        "contents field must not be specified when using raw_input_contents for 'A' for model 'pair'$",
    ),
    "no data": (
        lambda d: send_contents(d, [], []),
        *("INVALID_ARGUMENT", "unable to find data for input tensor 'A' for model 'pair' in request.$"),
    ),
}


def wait_until(is_true: Callable[[], bool]) -> None:
    """Polls with a deadline."""
    turn = threading.Event()
    for _ in range(int(TIMEOUT_S / 0.005)):
        if is_true():
            return
        turn.wait(0.005)
    raise AssertionError("never came")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
        if '"python"' in config:
            (root / name / "1" / "model.py").write_text(TRITON_CODE if name == "many" else CODE)
    return root


def open_site(models: Path, transport: str, control_mode: str = "explicit", io_threads: int = 1) -> Site:
    loaded = [name for name in MODELS if name not in ("broken", "gone")] if control_mode == "explicit" else []
    return Site(
        models,
        io_threads=io_threads if transport == "native" else 0,
        grpc={"transport": transport},
        lifecycle={"control_mode": control_mode, "load_models": loaded, "is_readiness_strict": False},
        shared_memory={"keys": "on"},
        execution={"backends": ["aiorch_backends.identity:IdentityBackend", "aiorch_backends.python:PythonBackend"]},
    )


@pytest.fixture(scope="module")
def sites(models: Path) -> Iterator[Callable[[str], Site]]:
    opened: dict[str, Site] = {}

    def get(door: str) -> Site:
        transport = "grpcio" if door == "grpcio" else "native"
        if transport not in opened:
            opened[transport] = open_site(models, transport)
            client = grpc_client.InferenceServerClient(opened[transport].target)
            client.load_model("gone")
            client.unload_model("gone")
            client.close()
            wait_until(lambda: all(each.name != "gone" for each in opened[transport].application.manager.servables()))
        return opened[transport]

    yield get
    for each in opened.values():
        each.close()


def connect(site: Site, door: str, stack: ExitStack) -> Door:
    library = http_client if door == "rest" else grpc_client
    client = library.InferenceServerClient(site.http if door == "rest" else site.target)
    stack.callback(client.close)
    stack.callback(client.unregister_system_shared_memory)
    path = Path("/dev/shm", f"aiorch_test_{os.getpid()}_refusals_{door}")
    path.write_bytes(bytes(64))
    stack.callback(path.unlink)
    return Door(site, library, client, f"/{path.name}")


@pytest.fixture
def door(request: pytest.FixtureRequest, sites: Callable[[str], Site]) -> Iterator[Door]:
    with ExitStack() as stack:
        yield connect(sites(request.param), request.param, stack)


def check(door: Door, row: tuple[Callable[[Door], Any], str, str]) -> None:
    act, code, text = row
    with pytest.raises(InferenceServerException) as caught:
        act(door)
    message = str(caught.value.message())
    assert message == text[:-1] if text.endswith("$") else message.startswith(text), message
    wanted = HTTP.get(code, "400") if door.library is http_client else f"StatusCode.{code}"
    assert caught.value.status() == wanted
    assert door.infer().as_numpy("X").tolist() == np.ones((1, 16)).tolist()


@pytest.mark.parametrize("door", DOORS, indirect=True)
@pytest.mark.parametrize("row", ROWS)
def test_row(door: Door, row: str) -> None:
    check(door, ROWS[row])


@pytest.mark.parametrize("door", ["native", "grpcio"], indirect=True)
@pytest.mark.parametrize("row", GRPC_ROWS)
def test_row_of_grpc(door: Door, row: str) -> None:
    check(door, GRPC_ROWS[row])


def test_loads_that_are_not_allowed(models: Path) -> None:
    """``load when not explicit``: the models of the folder are served, and nothing changes."""
    row = "UNAVAILABLE", "explicit model load / unload is not allowed if polling is enabled$"
    site = open_site(models, "native", "none")
    try:
        for name in ("native", "rest"):
            with ExitStack() as stack:
                door = connect(site, name, stack)
                check(door, (lambda d: d.client.load_model("pair"), *row))
                check(door, (lambda d: d.client.unload_model("pair"), *row))
    finally:
        site.close()


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_stopping(models: Path, transport: str) -> None:
    """``stopping``: a request waits, so the models are drained while the doors are still open."""
    site = open_site(models, transport)
    with ExitStack() as stack:
        stack.callback(site.close)
        doors = [connect(site, name, stack) for name in (transport, "rest")]
        tensors, told = [doors[0].fill("A")], threading.Event()
        doors[0].client.async_infer("gate", tensors, lambda result, error: told.set())
        wait_until(lambda: site.count_pending("gate") == 1)
        stopping = asyncio.run_coroutine_threadsafe(site.application.manager.stop(1.0), site.loop)
        wait_until(lambda: site.application.manager.is_stopping)
        for door in doors:
            with pytest.raises(InferenceServerException) as caught:
                door.infer()
            assert "Server is stopping, scheduler for model has stopped accepting" in caught.value.message()
            assert caught.value.status() in ("StatusCode.UNAVAILABLE", "503")
            with pytest.raises(InferenceServerException, match="Server not ready"):
                door.client.get_model_metadata("pair")
        stopping.result(TIMEOUT_S)
        assert told.wait(TIMEOUT_S)


@pytest.mark.parametrize("door", ["native", "grpcio"], indirect=True)
def test_client_cancels(door: Door) -> None:
    """``client cancel``: the text is the client's own, and the request leaves its queue."""
    told: queue.Queue[Any] = queue.Queue()
    call = door.client.async_infer("gate", [door.fill("A")], lambda result, error: told.put(error))
    wait_until(lambda: door.site.count_pending("gate") == 1)
    call.cancel()
    error = told.get(timeout=TIMEOUT_S)
    assert (error.status(), error.message()) == ("StatusCode.CANCELLED", "Locally cancelled by application!")
    wait_until(lambda: door.site.count_pending("gate") == 0)

    door.client.start_stream(lambda result, error: told.put(error))
    door.client.async_stream_infer("gate", [door.fill("A")])
    wait_until(lambda: door.site.count_pending("gate") == 1)
    door.client.stop_stream(cancel_requests=True)
    error = told.get(timeout=TIMEOUT_S)
    assert (error.status(), error.message()) == ("StatusCode.CANCELLED", "Locally cancelled by application!")
    wait_until(lambda: door.site.count_pending("gate") == 0)
    assert door.infer().as_numpy("X").tolist() == np.ones((1, 16)).tolist()


SHUTTING_DOWN = "GRPC server is shutting down and has stopped accepting new requests."


def make_stream_request(model: str, id: str) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id=id, raw_input_contents=[bytes(64)])
    request.inputs.add(name="A", datatype="FP32", shape=[1, 16])
    return request


@pytest.mark.parametrize(("transport", "io_threads"), [("native", 1), ("native", 0), ("grpcio", 0)])
def test_stopping_while_a_stream_is_open(models: Path, transport: str, io_threads: int) -> None:
    """``stopping``, the other text: a new call goes nowhere, what is under way is answered, what comes next is not."""
    site = open_site(models, transport, io_threads=io_threads)
    requests: queue.Queue[pb.ModelInferRequest | None] = queue.Queue()
    with grpc_client.InferenceServerClient(site.target) as client:
        stub = client._client_stub
        answers = stub.ModelStreamInfer(iter(requests.get, None), timeout=TIMEOUT_S)
        closing: queue.Queue[pb.ModelInferRequest | None] = queue.Queue()
        strict = stub.ModelStreamInfer(
            iter(closing.get, None), metadata=(("triton_grpc_error", "true"),), timeout=TIMEOUT_S
        )
        closing.put(make_stream_request("gate", "early"))
        wait_until(lambda: site.count_pending("gate") == 1)
        site.run(infer_beside(site))
        assert next(strict).infer_response.id == "early"
        requests.put(make_stream_request("gate", "first"))
        wait_until(lambda: site.count_pending("gate") == 1)

        stopping = site.begin_stop(TIMEOUT_S)
        wait_until(lambda: site.application.manager.is_stopping)
        requests.put(make_stream_request("pair", "second"))
        requests.put(make_stream_request("nobody", "third"))
        closing.put(make_stream_request("gate", "late"))
        with pytest.raises(grpc.RpcError) as caught:
            next(strict)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, SHUTTING_DOWN)
        assert not stopping.done()
        site.run(infer_beside(site))
        first, second, third = (next(answers) for _ in range(3))
        assert (first.error_message, first.infer_response.id) == ("", "first")
        for answer, id in ((second, "second"), (third, "third")):
            assert (answer.error_message, answer.infer_response.id) == (SHUTTING_DOWN, id)
            assert answer.infer_response.parameters["triton_final_response"].bool_param
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(make_stream_request("gate", "new"), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        requests.put(None)
        closing.put(None)
        assert list(answers) == [] and answers.code() is grpc.StatusCode.OK
        stopping.result(TIMEOUT_S)
    site.close()


async def infer_beside(site: Site) -> None:
    """The second request that ``gate`` waits for, past the doors."""
    await site.application.dataplane.infer(InferenceRequest("gate", "", [Tensor("A", "FP32", (1, 16), bytes(64))]))
