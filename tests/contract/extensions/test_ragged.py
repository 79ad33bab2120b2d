"""Requests of different shapes in one batch, through whole servers with tritonclient; each gets its own answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ragged_models as models
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import Site
from tritonclient.utils import InferenceServerException

LIBRARIES = {"grpc": grpc_client, "http": http_client}
BACKENDS = {
    "onnx": ("onnxruntime", models.save_onnx),
    "torch": ("pytorch", models.save_torch),
    "tensorflow": ("tensorflow", models.save_tensorflow),
}
DOORS = {
    "io-threads": {"io_threads": 1},
    "event-loop": {"io_threads": 0},
    "grpcio": {"io_threads": 1, "grpc": {"transport": "grpcio"}},
}
#: Four requests make a batch, whatever their shapes; fewer wait until their callers give up.
FOUR = "max_batch_size: 4 dynamic_batching { preferred_batch_size: [4] max_queue_delay_microseconds: 60000000 }"
#: Requests of an ensemble meet those of others in the queue of its step.
ENSEMBLE = f"""platform: "ensemble" max_batch_size: 16
    input {{ name: "INPUT" data_type: TYPE_FP32 dims: [-1] }}
    output [ {models.SUM}, {models.TWICE}, {models.COUNT} ]
    ensemble_scheduling {{ step {{ model_name: "onnx" model_version: -1
        input_map {{ key: "INPUT" value: "INPUT" }}
        output_map [ {{ key: "SUM" value: "SUM" }}, {{ key: "TWICE" value: "TWICE" }},
                     {{ key: "COUNT" value: "COUNT" }} ] }} }}"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    soon = "max_batch_size: 16 dynamic_batching { max_queue_delay_microseconds: 2000 }"
    for name, (backend, save) in BACKENDS.items():
        save(models.write_model(root, name, f'backend: "{backend}" {soon} {models.TENSORS}'))
    models.write_python(root, "python", f"{soon} {models.TENSORS}")
    models.write_python(root, "four", f"{FOUR} {models.TENSORS}")
    models.write_python(
        root,
        "together",
        f'{FOUR} {models.TENSORS} parameters {{ key: "isolate_failures" value {{ string_value: "false" }} }}',
    )
    models.write_model(root, "ensemble", ENSEMBLE)
    triton = f"input {models.INPUT} output [ {models.SUM}, {models.TWICE}, {models.COUNT} ]"
    models.write_python(root, "triton", f"{FOUR} {triton}", models.TRITON)
    return root


@pytest.fixture(scope="module", params=DOORS)
def site(request: pytest.FixtureRequest, repository: Path) -> Iterator[Site]:
    names = {
        "identity": "IdentityBackend",
        "onnxruntime": "OnnxRuntimeBackend",
        "python": "PythonBackend",
        "pytorch": "PyTorchBackend",
        "tensorflow": "TensorFlowBackend",
    }
    execution = {"backends": [f"aiorch_backends.{package}:{name}" for package, name in names.items()]}
    opened = Site(repository, execution=execution, **DOORS[request.param])
    yield opened
    opened.close()


class Client:
    """One of tritonclient's libraries, for requests to ragged models."""

    def __init__(self, site: Site, door: str) -> None:
        self._library = LIBRARIES[door]
        self._client = self._library.InferenceServerClient(site.target if door == "grpc" else site.http)

    def ask(self, model: str, values: Any, **options: Any) -> Any:
        return self._client.infer(model, [self.tensor(values)], **options)

    def start(self, model: str, values: Any, keep: Callable[[Any, Any], None]) -> Any:
        return self._client.async_infer(model, [self.tensor(values)], keep)

    def tensor(self, values: Any) -> Any:
        array = np.asarray(values, np.float32)
        array = array if array.ndim > 1 else array[None]
        tensor = self._library.InferInput("INPUT", list(array.shape), "FP32")
        tensor.set_data_from_numpy(array)
        return tensor

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    opened = Client(site, "grpc")
    yield opened
    opened.close()


def check(result: Any, values: Any) -> int:
    """That an answer is that of these values; how many requests ran with it."""
    array = np.asarray(values, np.float32)
    assert result.as_numpy("SUM").tolist() == [[float(array.sum())]]
    assert np.array_equal(result.as_numpy("TWICE"), 2 * array[None])
    (((count,),)) = result.as_numpy("COUNT").tolist()
    return int(count)


def await_queue(site: Site, model: str, count: int) -> None:
    until = time.monotonic() + 30
    while site.count_pending(model) != count:
        assert time.monotonic() < until, f"{site.count_pending(model)} requests wait for '{model}', not {count}"
        time.sleep(0.002)


@pytest.mark.parametrize("model", ["onnx", "torch", "tensorflow", "python", "ensemble"])
def test_each_of_many_clients_gets_its_own_sum(site: Site, model: str) -> None:
    """Whole numbers below 2^24, so that sums are exact whoever adds them up in whichever order."""
    largest = []

    def ask_often(seed: int) -> None:
        random = np.random.default_rng(seed)
        caller = Client(site, ("grpc", "http")[seed % 2])
        try:
            for _ in range(15):
                length = random.choice([random.integers(0, 40), 20_000], p=[0.9, 0.1])
                values = random.integers(-12, 13, length).astype(np.float32)
                largest.append(check(caller.ask(model, values), values))
        finally:
            caller.close()

    with ThreadPoolExecutor(12) as pool:
        for future in [pool.submit(ask_often, seed) for seed in range(12)]:
            future.result(60)
    assert max(largest) > 1, "no two requests of different shapes ran together"


class Asking:
    """Requests under way; answers by the place at which they were sent."""

    def __init__(self, site: Site, client: Client, model: str) -> None:
        self._site, self._client, self._model = site, client, model
        self.found: dict[int, Any] = {}
        self._came = threading.Condition()
        self._sent = 0

    def send(self, values: Any, *, waiting: int) -> Any:
        """Returns once so many wait in the queue."""
        place, self._sent = self._sent, self._sent + 1

        def keep(result: Any, error: Any) -> None:
            with self._came:
                self.found[place] = error or result
                self._came.notify_all()

        call = self._client.start(self._model, values, keep)
        await_queue(self._site, self._model, waiting)
        return call

    def wait(self, count: int) -> dict[int, Any]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.found) >= count, 30), self.found
            return dict(self.found)


@pytest.mark.parametrize("model", ["four", "triton"])
def test_requests_of_different_shapes_make_a_batch(site: Site, client: Client, model: str) -> None:
    asking = Asking(site, client, model)
    sent = [[1], [1, 2, 3], [], [5] * 30]
    for place, values in enumerate(sent):
        asking.send(values, waiting=(place + 1) % 4)
    found = asking.wait(4)
    assert [check(found[place], values) for place, values in enumerate(sent)] == [4] * 4


def test_a_request_that_fails_the_batch_fails_alone(site: Site, client: Client) -> None:
    for bad, text in (
        (13, "thirteen"),
        (26, r"output 'TWICE' has 1 elements \(shape \[1\]\); .* 'INPUT' .* ask for 2"),
    ):
        asking = Asking(site, client, "four")
        sent = [[1, 2], [bad, 1], [3], [4, 5, 6]]
        for place, values in enumerate(sent):
            asking.send(values, waiting=(place + 1) % 4)
        found = asking.wait(4)
        with pytest.raises(InferenceServerException, match=text):
            raise found[1]
        assert [check(found[place], sent[place]) for place in (0, 2, 3)] == [1] * 3  # run again, each alone


def test_without_isolation_a_bad_request_fails_its_batch(site: Site, client: Client) -> None:
    asking = Asking(site, client, "together")
    for place, values in enumerate([[1, 2], [13], [3], [4, 5, 6]]):
        asking.send(values, waiting=(place + 1) % 4)
    assert ["thirteen" in str(each) for each in asking.wait(4).values()] == [True] * 4


def test_a_cancelled_request_leaves_the_others_their_answers(site: Site, client: Client) -> None:
    asking = Asking(site, client, "four")
    sent = [[1, 2], [7, 7, 7], [3], [4, 5, 6], [8]]
    calls = [asking.send(values, waiting=place + 1) for place, values in enumerate(sent[:3])]
    calls[1].cancel()
    await_queue(site, "four", 2)
    asking.send(sent[3], waiting=3)
    asking.send(sent[4], waiting=0)
    found = asking.wait(5)
    assert "cancelled" in str(found[1]).lower()
    assert [check(found[place], sent[place]) for place in (0, 2, 3, 4)] == [4] * 4


def test_who_gives_up_while_the_batch_runs_disturbs_nobody(
    site: Site, client: Client, repository: Path, tmp_path: Path
) -> None:
    gate = repository / "1000"
    gate.unlink(missing_ok=True)
    asking = Asking(site, client, "four")
    sent = [[1, 2], [1000, 7, 7], [3]]
    calls = [asking.send(values, waiting=place + 1) for place, values in enumerate(sent)]
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.ask("four", [4, 5, 6, 7], client_timeout=0.3)  # the fourth: the batch runs, behind the gate
    calls[1].cancel()
    gate.touch()
    found = asking.wait(3)
    assert "cancelled" in str(found[1]).lower()
    assert [check(found[place], sent[place]) for place in (0, 2)] == [4] * 2


def test_clients_see_the_shapes_of_requests(site: Site) -> None:
    with grpc_client.InferenceServerClient(site.target) as caller:
        for name in (*BACKENDS, "python", "triton"):
            metadata = caller.get_model_metadata(name, as_json=True)
            assert [(each["name"], each["shape"]) for each in metadata["inputs"]] == [("INPUT", ["-1", "-1"])]
            shapes = {each["name"]: each["shape"] for each in metadata["outputs"]}
            assert shapes == {"SUM": ["-1", "1"], "TWICE": ["-1", "-1"], "COUNT": ["-1", "1"]}
        config = caller.get_model_config("onnx").config
        assert (config.max_batch_size, config.input[0].allow_ragged_batch) == (16, True)
        assert config.batch_input[0].target_name == ["INDEX"]
        assert config.batch_output[0].target_name == ["TWICE"]


def test_what_no_request_can_be_is_refused_in_words(client: Client) -> None:
    with pytest.raises(InferenceServerException, match=r"unexpected shape for input 'INPUT' .* Expected \[-1,-1\]"):
        client.ask("onnx", np.zeros((1, 2, 3)))
    with pytest.raises(InferenceServerException, match="batch-size must be <= 16"):
        client.ask("onnx", np.zeros((17, 1)))
    # one count for each request, as the protocol has it: a model that makes a row of each wants requests of one row
    with pytest.raises(InferenceServerException, match=r"output 'SUM' has shape .* for a batch of 2 rows"):
        client.ask("onnx", np.zeros((2, 3)))
