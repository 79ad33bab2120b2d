"""Models written for Triton's python backend, in a whole server, asked by Triton's own clients."""

from __future__ import annotations

import gc
import json
import queue
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from running_site import Site
from tritonclient.utils import InferenceServerException

ONE_TENSOR = """
    {policy} max_batch_size: {size}
    input {{ name: "X" data_type: TYPE_INT32 dims: [ 1 ] }} output {{ name: "Y" data_type: TYPE_INT32 dims: [ 1 ] }}
"""
DECOUPLED = "model_transaction_policy { decoupled: true }"

MODELS: dict[str, tuple[str, str]] = {
    # how a model is set up, and everything that a request tells it
    "tell": (
        """
        max_batch_size: 4
        input { name: "X" data_type: TYPE_INT32 dims: [ 1 ] } output { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }
        parameters { key: "color" value { string_value: "blue" } }
        """,
        """
        import json
        import sys
        import numpy as np
        import triton_python_backend_utils as pb_utils
        import words
        from helpers.deep import NAME

        class TritonPythonModel:
            def initialize(self, args):
                assert all(type(value) is str for value in args.values())
                self.args = args
                self.config = json.loads(args["model_config"])
                output = pb_utils.get_output_config_by_name(self.config, "TEXT")
                assert pb_utils.triton_string_to_numpy(output["data_type"]) is np.object_
                assert pb_utils.get_input_config_by_name(self.config, "X")["dims"] == [1]
                assert pb_utils.get_input_config_by_name(self.config, "none") is None
                assert not pb_utils.using_decoupled_model_transaction_policy(self.config)
                assert "triton_python_backend_utils" not in sys.modules

            def execute(self, requests):
                return [self.answer(request) for request in requests]

            def answer(self, request):
                tensor = pb_utils.get_input_tensor_by_name(request, "X")
                assert pb_utils.get_input_tensor_by_name(request, "none") is None
                told = {
                    "args": {key: value for key, value in self.args.items() if key != "model_config"},
                    "color": self.config["parameters"]["color"]["string_value"],
                    "sum": int(tensor.as_numpy().sum()), "shape": tensor.shape(), "dtype": tensor.triton_dtype(),
                    "is_cpu": tensor.is_cpu(), "id": request.request_id(), "sequence": request.correlation_id(),
                    "flags": request.flags(), "timeout": request.timeout(), "wanted": request.requested_output_names(),
                    "parameters": json.loads(request.parameters()), "word": words.WORD, "name": NAME,
                }
                text = np.array([[json.dumps(told).encode()]] * tensor.shape()[0], dtype=np.object_)
                return pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", text)], parameters={"n": 1, "s": "x"})
        """,
    ),
    # one answer for each request of a batch, some of them errors
    "moods": (
        ONE_TENSOR.format(policy="", size=8) + "dynamic_batching { max_queue_delay_microseconds: 200000 "
        "preferred_batch_size: [ 4 ] }",
        """
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            def execute(self, requests):
                return [self.answer(request, len(requests)) for request in requests]

            def answer(self, request, count):
                value = request.inputs()[0].as_numpy()
                if value[0, 0] == 3:
                    error = pb_utils.TritonError("three is not liked", pb_utils.TritonError.INVALID_ARG)
                    return pb_utils.InferenceResponse(output_tensors=[], error=error)
                if value[0, 0] == 4:
                    return pb_utils.InferenceResponse([pb_utils.Tensor("Y", value.astype("float32"))])
                return pb_utils.InferenceResponse([pb_utils.Tensor("Y", value * 0 + count)])
        """,
    ),
    "wrong": (
        ONE_TENSOR.format(policy="", size=0),
        """
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            def execute(self, requests):
                value = int(requests[0].inputs()[0].as_numpy()[0])
                if value == 0:
                    raise pb_utils.TritonModelException("nothing is right")
                return {1: 5, 2: [], 3: ["no response"], 4: [None], 5: None, 6: (1,)}[value]
        """,
    ),
    # nothing in the configuration: all of it from auto_complete_config
    "unwritten": (
        "",
        """
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            @staticmethod
            def auto_complete_config(config):
                assert config.as_dict()["max_batch_size"] == 0 and config.as_dict()["input"] == []
                config.set_max_batch_size(4)
                config.set_dynamic_batching()
                config.add_input({"name": "X", "data_type": "TYPE_INT32", "dims": [1]})
                config.add_input({"name": "MORE", "data_type": "TYPE_INT32", "dims": [1], "optional": True})
                config.add_output({"name": "Y", "data_type": "TYPE_INT32", "dims": [1]})
                return config

            async def execute(self, requests):
                return [
                    pb_utils.InferenceResponse(
                        [pb_utils.Tensor("Y", sum(each.as_numpy() for each in request.inputs()))]
                    )
                    for request in requests
                ]
        """,
    ),
    # senders from threads, from coroutines, and of a model that is not decoupled
    "spell": (
        "",
        """
        import threading
        import numpy as np
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            @staticmethod
            def auto_complete_config(config):
                config.add_input({"name": "TEXT", "data_type": "TYPE_STRING", "dims": [1]})
                config.add_output({"name": "LETTER", "data_type": "TYPE_STRING", "dims": [1]})
                config.set_model_transaction_policy({"decoupled": True})
                return config

            def initialize(self, args):
                self.threads = []

            def execute(self, requests):
                for request in requests:
                    text = request.inputs()[0].as_numpy()[0].decode()
                    thread = threading.Thread(target=self.spell, args=(request.get_response_sender(), text))
                    self.threads.append(thread)
                    thread.start()

            def spell(self, sender, text):
                for letter in text:
                    if letter == "!":
                        sender.send(
                            pb_utils.InferenceResponse(error=pb_utils.TritonError("too loud")),
                            flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
                        )
                        return
                    array = np.array([letter.encode()], dtype=np.object_)
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("LETTER", array)]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                for wrong in [{}, {"flags": 7}, {"flags": 1}]:
                    try:
                        sender.send(**wrong)
                    except pb_utils.TritonModelException:
                        continue
                    raise AssertionError(wrong)

            def finalize(self):
                for thread in self.threads:
                    thread.join()
        """,
    ),
    "murmur": (
        ONE_TENSOR.format(policy=DECOUPLED, size=0),
        """
        import asyncio
        import numpy as np
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            async def execute(self, requests):
                assert len(requests) == 1
                count = int(requests[0].inputs()[0].as_numpy()[0])
                sender = requests[0].get_response_sender()
                for index in range(count):
                    if index == 5:
                        raise ValueError("five is too many")
                    await asyncio.sleep(0.001)
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([index], np.int32))]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        """,
    ),
    "later": (
        ONE_TENSOR.format(policy="", size=0),
        """
        import threading
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            def execute(self, requests):
                for request in requests:
                    threading.Thread(target=self.answer, args=(request, request.get_response_sender())).start()

            def answer(self, request, sender):
                tensor = request.inputs()[0].as_numpy()
                sender.send(
                    pb_utils.InferenceResponse([pb_utils.Tensor("Y", tensor + 1)]),
                    flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
                )
        """,
    ),
    # calls to the others: one answer, many, at once from coroutines, and what goes wrong
    "asks": (
        """
        max_batch_size: 0
        input { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }
        output { name: "SAID" data_type: TYPE_STRING dims: [ -1 ] }
        """,
        """
        import numpy as np
        import triton_python_backend_utils as pb_utils

        def say(*words):
            array = np.array([str(word).encode() for word in words], dtype=np.object_)
            return pb_utils.InferenceResponse([pb_utils.Tensor("SAID", array)])

        class TritonPythonModel:
            def execute(self, requests):
                return [self.answer(request.inputs()[0]) for request in requests]

            def answer(self, tensor):
                text = tensor.as_numpy()[0]
                if text == b"later":
                    question = pb_utils.InferenceRequest(
                        model_name=b"later", requested_output_names=[b"Y"],
                        inputs=[pb_utils.Tensor("X", np.array([4], np.int32))],
                    )
                    response = question.exec()
                    assert not response.has_error()
                    return say(pb_utils.get_output_tensor_by_name(response, "Y").as_numpy()[0])
                if text.startswith(b"nobody"):
                    name = text.decode()
                else:
                    name = "spell"
                question = pb_utils.InferenceRequest(
                    model_name=name, requested_output_names=["LETTER"],
                    inputs=[pb_utils.Tensor("TEXT", tensor.as_numpy())],
                )
                if text.startswith((b"nobody", b"one")):
                    response = question.exec()
                    assert response.has_error()
                    return say(response.error().code(), response.error().message())
                letters = []
                for response in question.exec(decoupled=True):
                    if response.has_error():
                        letters.append(response.error().message())
                        break
                    letters += [each.as_numpy()[0].decode() for each in response.output_tensors()]
                return say(*letters)
        """,
    ),
    "asks_at_once": (
        ONE_TENSOR.format(policy="", size=0),
        """
        import asyncio
        import numpy as np
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            async def execute(self, requests):
                count = int(requests[0].inputs()[0].as_numpy()[0])
                questions = [
                    pb_utils.InferenceRequest(
                        model_name="later", requested_output_names=["Y"],
                        inputs=[pb_utils.Tensor("X", np.array([index], np.int32))],
                    )
                    for index in range(count)
                ]
                answers = await asyncio.gather(*(question.async_exec() for question in questions))
                total = sum(answer.output_tensors()[0].as_numpy() for answer in answers)
                return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", total.astype(np.int64))])]
        """,
    ),
    "counted": (
        ONE_TENSOR.format(policy="", size=0),
        """
        import triton_python_backend_utils as pb_utils

        class TritonPythonModel:
            def initialize(self, args):
                labels = {"model": args["model_name"]}
                family = pb_utils.MetricFamily(
                    name="seen_values", description="What came by", kind=pb_utils.MetricFamily.COUNTER
                )
                self.seen = family.Metric(labels=labels)
                self.last = pb_utils.MetricFamily("last_value", "The last", pb_utils.MetricFamily.GAUGE).Metric()
                sizes = pb_utils.MetricFamily("value_size", "Sizes", pb_utils.MetricFamily.HISTOGRAM)
                self.sizes = sizes.Metric(labels=labels, buckets=[1, 10])
                for wrong in (lambda: self.seen.increment(-1), lambda: self.seen.set(1), lambda: self.last.observe(1)):
                    try:
                        wrong()
                    except pb_utils.TritonModelException:
                        continue
                    raise AssertionError("a metric did what its kind cannot do")
                pb_utils.Logger.log_info("counting begins")
                pb_utils.Logger.log("really", pb_utils.Logger.WARNING)

            def execute(self, requests):
                value = int(requests[0].inputs()[0].as_numpy()[0])
                self.seen.increment(value)
                self.last.set(value)
                self.sizes.observe(value)
                assert self.last.value() == value
                return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", requests[0].inputs()[0].as_numpy())])]
        """,
    ),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("models")
    for name, (config, code) in MODELS.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.py").write_text(textwrap.dedent(code))
        if config:
            (root / name / "config.pbtxt").write_text(f'backend: "python" {config}')
    (root / "tell" / "1" / "words.py").write_text('import triton_python_backend_utils as again\nWORD = "private"\n')
    (root / "tell" / "helpers").mkdir()
    (root / "tell" / "helpers" / "deep.py").write_text("import words\nNAME = words.WORD + '!'\n")
    site = Site(root, io_threads=1, metrics={"host": "127.0.0.1", "port": 0})
    try:
        states = {each.name: (each.state.value, each.reason) for each in site.application.manager.index()}
        assert states == dict.fromkeys(MODELS, ("READY", ""))
        yield site
    finally:
        site.close()
        until = time.monotonic() + 10  # a thread that still unloads is not waited for by who closes
        while (
            left := [name for name in sys.modules if name.startswith("aiorch_models_")]
        ) and time.monotonic() < until:
            gc.collect()
        assert not left


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Any]:
    with triton.InferenceServerClient(site.target) as client:
        yield client


def give(name: str, values: Any, datatype: str = "INT32") -> Any:
    array = np.array(values, np.object_ if datatype == "BYTES" else np.int32)
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def refuse(call: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return str(caught.value.status()), str(caught.value.message())


def follow(site: Site, model: str, *inputs: Any, **options: Any) -> list[Any]:
    """All answers of one request, an error as its text."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    found: list[Any] = []
    with triton.InferenceServerClient(site.target) as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, list(inputs), enable_empty_final_response=True, **options)
        while True:
            result, error = answers.get(timeout=20)
            if error is not None:
                found.append(str(error))
                client.stop_stream()
                return found
            response = result.get_response()
            if response.outputs:
                found.append(result.as_numpy(response.outputs[0].name).ravel()[0])
            if response.parameters["triton_final_response"].bool_param:
                client.stop_stream()
                return found


def test_what_a_model_is_told(client: Any) -> None:
    answer = client.infer(
        "tell",
        [give("X", [[4], [5]])],
        outputs=[triton.InferRequestedOutput("TEXT")],
        request_id="q1",
        sequence_id=9,
        sequence_start=True,
        priority=0,
        timeout=5_000_000,
        parameters={"mine": "yes", "level": 3, "is": True},
    )
    first, second = (json.loads(text) for text in answer.as_numpy("TEXT").ravel())
    assert first == second
    args = first.pop("args")
    assert args.pop("model_repository").endswith("tell")
    assert args == {
        "model_instance_kind": "CPU",
        "model_instance_name": "tell_0_0",
        "model_instance_device_id": "0",
        "model_version": "1",
        "model_name": "tell",
    }
    assert first == {
        "color": "blue", "sum": 9, "shape": [2, 1], "dtype": 8, "is_cpu": True, "id": "q1", "sequence": 9, "flags": 1,
        "timeout": 5_000_000, "wanted": ["TEXT"], "parameters": {"mine": "yes", "level": 3, "is": True},
        "word": "private", "name": "private!",
    }  # fmt: skip
    parameters = answer.get_response().parameters
    assert (parameters["n"].int64_param, parameters["s"].string_param) == (1, "x")


def test_a_plain_request_over_the_compiled_path(client: Any) -> None:
    answer = client.infer("tell", [give("X", [[1]])], request_id="plain")
    told = json.loads(answer.as_numpy("TEXT").ravel()[0])
    assert (told["id"], told["parameters"], told["sequence"], told["wanted"]) == ("plain", {}, 0, ["TEXT"])
    parameters = answer.get_response().parameters
    assert (parameters["n"].int64_param, parameters["s"].string_param) == (1, "x")


def test_requests_of_one_batch_succeed_and_fail_alone(client: Any) -> None:
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for value in (1, 3, 4, 1):
        client.async_infer(
            "moods",
            [give("X", [[value]])],
            callback=lambda result, error, value=value: answers.put((value, result, error)),
        )
    found = [answers.get(timeout=20) for _ in range(4)]
    for value, result, error in found:
        if value == 1:
            assert error is None and result.as_numpy("Y").tolist() == [[4]]  # all four were together
        elif value == 3:
            assert (error.status(), error.message()) == ("StatusCode.INVALID_ARGUMENT", "three is not liked")
        else:
            assert "output 'Y' has numpy type float32; INT32 needs int32" in error.message()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "Failed to process the request(s) for model 'wrong_0_0', message: TritonModelException: nothing is right"),
        (1, "Expected a list in the execute return, found type '<class 'int'>'."),
        (2, "InferenceRequest(s) size is:1, and InferenceResponse(s) size is:0"),
        (3, "Expected an 'InferenceResponse' object in the execute function return list, found type '<class 'str'>'."),
        (4, "without a final answer"),
        (5, "without a final answer"),
        (6, "Expected a list in the execute return, found type '<class 'tuple'>'."),
    ],
)
def test_wrong_returns_say_what_would_be_right(client: Any, value: int, text: str) -> None:
    status, message = refuse(lambda: client.infer("wrong", [give("X", [value])]))
    assert status == "StatusCode.INTERNAL" and text in message


def test_a_configuration_that_the_model_completes(client: Any) -> None:
    config = client.get_model_config("unwritten", as_json=True)["config"]
    assert config["max_batch_size"] == 4
    assert [(each["name"], each.get("optional", False)) for each in config["input"]] == [("X", False), ("MORE", True)]
    assert client.infer("unwritten", [give("X", [[2]])]).as_numpy("Y").tolist() == [[2]]
    both = [give("X", [[2], [3]]), give("MORE", [[5], [6]])]
    assert client.infer("unwritten", both).as_numpy("Y").tolist() == [[7], [9]]


def test_answers_from_threads(site: Site, client: Any) -> None:
    assert client.get_model_config("spell", as_json=True)["config"]["model_transaction_policy"] == {"decoupled": True}
    assert follow(site, "spell", give("TEXT", [b"abc"], "BYTES")) == [b"a", b"b", b"c"]
    assert follow(site, "spell", give("TEXT", [b""], "BYTES")) == []
    assert follow(site, "spell", give("TEXT", [b"a!"], "BYTES")) == [b"a", "too loud"]
    status, message = refuse(lambda: client.infer("spell", [give("TEXT", [b"abc"], "BYTES")]))
    assert status == "StatusCode.UNIMPLEMENTED" and "decoupled transaction policy" in message
    with triton_http.InferenceServerClient(site.http) as http:
        tensor = triton_http.InferInput("TEXT", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([b"abc"], np.object_))
        status, message = refuse(lambda: http.infer("spell", [tensor]))
        assert status == "501" and "decoupled transaction policy" in message


def test_answers_from_coroutines(site: Site) -> None:
    assert follow(site, "murmur", give("X", [3])) == [0, 1, 2]
    *values, text = follow(site, "murmur", give("X", [9]))
    assert values == [0, 1, 2, 3, 4] and "ValueError: five is too many" in text


def test_an_ordinary_model_may_answer_later(client: Any) -> None:
    assert client.infer("later", [give("X", [6])]).as_numpy("Y").tolist() == [7]


def test_calls_to_other_models(client: Any) -> None:
    def ask(text: bytes) -> list[bytes]:
        return list(client.infer("asks", [give("TEXT", [text], "BYTES")]).as_numpy("SAID"))

    assert ask(b"later") == [b"5"]
    assert ask(b"abc") == [b"a", b"b", b"c"]
    assert ask(b"ab!") == [b"a", b"b", b"too loud"]
    code, message = ask(b"nobody is there")
    assert code == b"3" and b"unknown model: 'nobody is there' is not found" in message
    code, message = ask(b"one answer only")
    assert code == b"5" and b"'spell' is decoupled and gave more" in message


def test_calls_at_once_from_coroutines(client: Any) -> None:
    # INT64 is given where INT32 is declared: the client gets what is declared
    assert client.infer("asks_at_once", [give("X", [5])]).as_numpy("Y").tolist() == [15]


def test_metrics_of_the_model(site: Site, client: Any) -> None:
    for value in (1, 6):
        client.infer("counted", [give("X", [value])])
    text = httpx.get(f"http://127.0.0.1:{site.application.metrics_port}/metrics").text
    lines = text.splitlines()
    for line in (
        "# HELP seen_values What came by",
        "# TYPE seen_values counter",
        'seen_values{model="counted"} 7.0',
        "# TYPE last_value gauge",
        "last_value 6.0",
        'value_size_bucket{le="1.0",model="counted"} 1.0',
        'value_size_bucket{le="10.0",model="counted"} 2.0',
        'value_size_bucket{le="+Inf",model="counted"} 2.0',
        'value_size_sum{model="counted"} 7.0',
    ):
        assert line in lines, line
    follow(site, "spell", give("TEXT", [b"a"], "BYTES"))
    assert 'nv_inference_first_response_histogram_ms_count{model="spell",version="1"} ' in text
