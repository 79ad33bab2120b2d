"""The request layer without I/O: each test plays the network and the clock itself."""

import grpc
import numpy as np
import pytest
from aiorch_client import ClientError, NotFoundError, RequestError, RetryPolicy, ServerError, UnavailableError
from aiorch_client.calls import RequestLayer
from aiorch_client.channel import TlsConfig, call_metadata, check_target
from aiorch_client.errors import PUSHBACK_KEY, from_rpc_error
from aiorch_client.messages import decode_infer, encode_infer, to_plain
from aiorch_client.steps import Pause, Send
from aiorch_client.types import InferRequest, ModelMetadata, TensorMetadata
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2 import model_config_pb2

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Refusal(grpc.RpcError):
    """What grpc raises, with the three methods that the SDK reads."""

    def __init__(self, code, details="no", trailers=()):
        super().__init__(details)
        self._parts = (code, details, trailers)

    def code(self):
        return self._parts[0]

    def details(self):
        return self._parts[1]

    def trailing_metadata(self):
        return self._parts[2]


class Script:
    """Answers each step with the next reply and notes the steps; pauses and ``slow`` replies move the clock."""

    def __init__(self, *replies, retry=None, timeout_s=10.0):
        self.now_s = 100.0
        self.steps = []
        self.replies = list(replies)
        self.layer = RequestLayer(
            timeout_s=timeout_s, retry=retry or RetryPolicy(), clock_s=lambda: self.now_s, draw=lambda: 0.5
        )

    def play(self, steps):
        try:
            step = next(steps)
            while True:
                self.steps.append(step)
                if isinstance(step, Pause):
                    self.now_s += step.seconds
                    step = steps.send(None)
                    continue
                reply = self.replies.pop(0)
                step = steps.throw(reply) if isinstance(reply, Exception) else steps.send(reply)
        except StopIteration as end:
            return end.value

    @property
    def sent(self):
        return [step.method for step in self.steps if isinstance(step, Send)]

    @property
    def pauses(self):
        return [step.seconds for step in self.steps if isinstance(step, Pause)]


def metadata(*shape, versions=("1",), datatype="FP32"):
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name="m",
        versions=versions,
        inputs=[tensor(name="x", datatype=datatype, shape=shape)],
        outputs=[tensor(name="y", datatype=datatype, shape=shape)],
    )


def answer(version="1"):
    reply = pb.ModelInferResponse(model_name="m", model_version=version)
    reply.outputs.add(name="y", datatype="FP32", shape=[1])
    reply.raw_output_contents.append(np.float32(7).tobytes())
    return reply


def ask(script, value=None, **rest):
    request = InferRequest("m", np.zeros(1, np.float32) if value is None else value, **rest)
    return script.play(script.layer.infer(request, None))


def test_metadata_is_fetched_once():
    script = Script(metadata(-1), answer(), answer())
    assert ask(script)["y"].tolist() == [7]
    ask(script)
    assert script.sent == ["ModelMetadata", "ModelInfer", "ModelInfer"]


@pytest.mark.parametrize("refusals", [1, 2])
def test_unavailable_is_tried_again_after_growing_pauses(refusals):
    script = Script(metadata(-1), *[Refusal(UNAVAILABLE)] * refusals, answer())
    ask(script)
    assert script.pauses == [0.05 * 0.75, 0.1 * 0.75][:refusals]


def test_attempts_are_bounded():
    script = Script(metadata(-1), *[Refusal(UNAVAILABLE, "full")] * 3)
    with pytest.raises(UnavailableError, match="full") as caught:
        ask(script)
    assert caught.value.retryable
    assert isinstance(caught.value.__cause__, Refusal)
    assert script.sent.count("ModelInfer") == 3


def test_a_pause_beyond_the_deadline_is_not_begun():
    policy = RetryPolicy(max_attempts=100, initial_backoff_s=4, max_backoff_s=4)
    script = Script(*[Refusal(UNAVAILABLE)] * 100, retry=policy)
    with pytest.raises(UnavailableError):
        ask(script)
    assert script.pauses == [3.0, 3.0, 3.0]
    assert [step.timeout_s for step in script.steps if isinstance(step, Send)] == [10, 7, 4, 1]


@pytest.mark.parametrize(
    "code",
    [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, UNAVAILABLE)],
)
def test_no_other_code_is_tried_again(code):
    script = Script(metadata(-1), Refusal(code), metadata(-1))
    with pytest.raises(ClientError) as caught:
        ask(script)
    assert caught.value.code is code
    assert not caught.value.retryable
    assert script.sent.count("ModelInfer") == 1


def test_every_code_has_its_class():
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            assert type(from_rpc_error(Refusal(code))) in (RequestError, NotFoundError, UnavailableError, ServerError)


def test_the_server_may_ask_for_a_pause_or_forbid_another_attempt():
    script = Script(
        metadata(-1), Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", [(PUSHBACK_KEY, "1500")]), answer()
    )
    ask(script)
    assert script.pauses == [1.5 + 1.5 / 4 / 2], "those who were refused together do not return as one"
    script = Script(metadata(-1), Refusal(UNAVAILABLE, "late", [(PUSHBACK_KEY, "2")]), answer())
    ask(script)
    assert script.pauses == [pytest.approx(0.002 + 0.05 / 4)]
    hopeless = Script(metadata(-1), *[Refusal(UNAVAILABLE, "full", [(PUSHBACK_KEY, "3600000")])] * 9)
    with pytest.raises(UnavailableError, match="full") as caught:
        ask(hopeless)
    assert hopeless.pauses == [] and caught.value.retry_after_s == 3600, "a pause beyond the deadline is not begun"
    for word in ("-1", "soon", "9" * 400, "9" * 5000):
        script = Script(metadata(-1), Refusal(UNAVAILABLE, "no", [(PUSHBACK_KEY, word)]))
        with pytest.raises(UnavailableError) as caught:
            ask(script)
        assert not caught.value.retryable


def test_requests_of_a_sequence_are_sent_once():
    script = Script(metadata(-1), Refusal(UNAVAILABLE))
    with pytest.raises(UnavailableError):
        ask(script, parameters={"sequence_id": 5, "sequence_start": True})
    assert script.sent == ["ModelMetadata", "ModelInfer"]


def test_lifecycle_calls_are_sent_once():
    for make in (lambda layer: layer.load("m", None, None, None), lambda layer: layer.unload("m", False, None)):
        script = Script(Refusal(UNAVAILABLE))
        with pytest.raises(UnavailableError):
            script.play(make(script.layer))
        assert len(script.sent) == 1


def test_a_model_that_changed_is_looked_up_again_and_the_request_encoded_anew():
    script = Script(metadata(-1), Refusal(grpc.StatusCode.INVALID_ARGUMENT), metadata(-1, datatype="FP64"), answer())
    assert ask(script)["y"].tolist() == [7]
    first, second = (step.request for step in script.steps if step.method == "ModelInfer")
    assert (first.inputs[0].datatype, second.inputs[0].datatype) == ("FP32", "FP64")


def test_a_model_that_changed_so_that_the_request_does_not_fit_says_what_it_takes_now():
    script = Script(metadata(-1), Refusal(grpc.StatusCode.INVALID_ARGUMENT, "old text"), metadata(4))
    with pytest.raises(RequestError, match=r"shape \[1\], expected \[4\]"):
        ask(script)


def test_a_refusal_by_an_unchanged_model_is_the_callers():
    script = Script(metadata(-1), Refusal(grpc.StatusCode.INVALID_ARGUMENT, "batch-size must be <= 8"), metadata(-1))
    with pytest.raises(RequestError, match="batch-size must be <= 8"):
        ask(script)
    assert script.sent == ["ModelMetadata", "ModelInfer", "ModelMetadata"]


def test_a_request_that_fits_only_the_changed_model_is_not_refused_by_old_metadata():
    script = Script(metadata(4), metadata(-1), answer())
    with pytest.raises(RequestError, match=r"expected \[4\]"):
        ask(script)
    script.replies = [metadata(-1), answer()]
    assert ask(script)["y"].tolist() == [7]


def test_what_does_not_fit_is_checked_against_fresh_metadata_once():
    script = Script(metadata(-1), answer(), metadata(-1))
    ask(script)
    with pytest.raises(RequestError, match="no input 'q'"):
        ask(script, {"q": [1.0]})
    assert script.sent == ["ModelMetadata", "ModelInfer", "ModelMetadata"]


def test_a_model_that_is_gone_is_not_found():
    script = Script(
        metadata(-1), Refusal(grpc.StatusCode.INVALID_ARGUMENT), Refusal(grpc.StatusCode.INVALID_ARGUMENT, "unknown m")
    )
    with pytest.raises(NotFoundError, match="unknown m"):
        ask(script)


def test_an_answer_by_a_version_that_was_not_there_before_drops_the_metadata():
    script = Script(metadata(-1), answer("2"), metadata(-1, versions=("2",)), answer("2"), answer("2"))
    for _ in range(3):
        ask(script)
    assert script.sent == ["ModelMetadata", "ModelInfer", "ModelMetadata", "ModelInfer", "ModelInfer"]


def test_a_missing_input_is_looked_up_in_the_configuration_only_then():
    two = metadata(-1)
    two.inputs.add(name="z", datatype="FP32", shape=[-1])
    config = pb.ModelConfigResponse()
    config.config.input.add(name="x")
    config.config.input.add(name="z", optional=True)
    script = Script(two, config, answer(), answer())
    one = {"x": [1.0]}
    ask(script, one)
    ask(script, one)
    assert script.sent == ["ModelMetadata", "ModelConfig", "ModelInfer", "ModelInfer"]
    script.replies = [two, two, config, two]
    with pytest.raises(RequestError, match="also needs input 'x'"):
        ask(script, {"z": [1.0]})
    with pytest.raises(RequestError, match=r"has 2 inputs \('x' FP32 \[-1\], 'z' FP32 \[-1\]\)"):
        ask(script)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (InferRequest("m", {"q": [1.0]}), "no input 'q'"),
        (InferRequest("m", {"x": [1.0, 2.0]}), r"shape \[2\], expected \[-1, 2\]; the first dimension is the batch"),
        (InferRequest("m", {"x": [[1.0, 2.0, 3.0]]}), r"shape \[1, 3\], expected \[-1, 2\]"),
        (InferRequest("m", {"x": [["1", "2"]]}), "holds '1' .* takes FP32"),
        (InferRequest("m", {"x": [[1, 2]]}, outputs=["z"]), r"no output 'z'; it gives 'y' FP32 \[-1, 2\]"),
        (InferRequest("m", {"x": [[1, 2]]}, parameters={"a": 2**64}), "64 bits"),
        (InferRequest("m", {"x": [[1, 2]]}, parameters={"a": b"x"}), "expected bool, int, float or str"),
        (InferRequest("m", {"x": [[1, 2]]}, version="-1"), "whole number above 0"),
    ],
)
def test_a_request_that_does_not_fit_is_never_sent(request_, text):
    script = Script(metadata(-1, 2), pb.ModelConfigResponse())
    with pytest.raises(RequestError, match=text):
        script.play(script.layer.infer(request_, None))
    assert "ModelInfer" not in script.sent


def test_time_that_ran_out_between_look_up_and_request():
    script = Script(metadata(-1))
    steps = script.layer.infer(InferRequest("m", [1.0]), 5.0)
    assert next(steps).timeout_s == 5.0
    script.now_s += 5.0
    with pytest.raises(UnavailableError) as caught:
        steps.send(metadata(-1))
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not caught.value.retryable


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_deadline_is_always_set(timeout_s):
    with pytest.raises(RequestError, match="timeout_s"):
        Script(timeout_s=timeout_s)


def test_probes_make_one_attempt_and_say_no_where_nobody_answers():
    for probe in ("is_live", "is_ready"):
        script = Script(Refusal(UNAVAILABLE))
        assert script.play(getattr(script.layer, probe)(None)) is False
        assert len(script.sent) == 1
    script = Script(Refusal(grpc.StatusCode.INVALID_ARGUMENT))
    assert script.play(script.layer.is_model_ready("m", "", None)) is False
    with pytest.raises(RequestError):
        script = Script(Refusal(grpc.StatusCode.UNAUTHENTICATED))
        script.play(script.layer.is_live(None))


def test_parameters_keep_their_kind():
    spec = ModelMetadata("m", ("1",), "", (TensorMetadata("x", "INT32", (1,)),), ())
    given = {"b": True, "i": -3, "u": 2**64 - 1, "f": 0.5, "s": "text"}
    message = encode_infer(InferRequest("m", [1], parameters=given), spec)
    kinds = {key: value.WhichOneof("parameter_choice") for key, value in message.parameters.items()}
    assert kinds == {
        "b": "bool_param",
        "i": "int64_param",
        "u": "uint64_param",
        "f": "double_param",
        "s": "string_param",
    }
    reply = pb.ModelInferResponse(parameters=message.parameters)
    assert decode_infer(reply).parameters == given


def test_answers_with_typed_contents_are_read():
    reply = pb.ModelInferResponse(model_name="m")
    reply.outputs.add(name="i", datatype="INT8", shape=[2]).contents.int_contents.extend([1, -2])
    reply.outputs.add(name="s", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"a")
    result = decode_infer(reply)
    assert result["i"].dtype == np.int8
    assert result["i"].tolist() == [1, -2]
    assert result["s"].tolist() == [[b"a"]]
    with pytest.raises(KeyError, match="no output 'q'; the answer holds i, s"):
        result["q"]


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [("FP32", [2], [b"123"]), ("FP32", [-1, -1], [b"1234"]), ("FP9", [1], [b"1"]), ("FP32", [1], [b"1234", b"1234"])],
)
def test_an_answer_that_cannot_be_read_is_the_servers_fault(datatype, shape, raw):
    reply = pb.ModelInferResponse(raw_output_contents=raw)
    reply.outputs.add(name="y", datatype=datatype, shape=shape)
    with pytest.raises(ServerError, match="cannot be read"):
        decode_infer(reply)


def test_messages_become_plain_values_with_the_protocols_names():
    config = model_config_pb2.ModelConfig(name="m", max_batch_size=8)
    config.input.add(name="x", data_type=model_config_pb2.TYPE_FP32, dims=[-1, 4])
    config.parameters["k"].string_value = "v"
    config.dynamic_batching.preferred_batch_size.append(4)
    assert to_plain(config) == {
        "name": "m",
        "max_batch_size": 8,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
        "parameters": {"k": {"string_value": "v"}},
        "dynamic_batching": {"preferred_batch_size": [4]},
    }


@pytest.mark.parametrize("target", ["", "http://127.0.0.1:8000", "grpc://x:1"])
def test_web_addresses_are_refused(target):
    with pytest.raises(RequestError, match="host:port"):
        check_target(target)


def test_addresses_of_grpc_are_taken():
    for target in ("127.0.0.1:8001", "[::1]:8001", "unix:/tmp/x", "unix:///tmp/x", "dns:///host:1"):
        assert check_target(target) == target


def test_metadata_is_checked_and_the_token_becomes_a_bearer():
    assert call_metadata("t", {"a": "b", "c-bin": b"\0"}) == (
        ("a", "b"),
        ("c-bin", b"\0"),
        ("authorization", "Bearer t"),
    )
    for wrong in ({"A": "b"}, {"a": b"b"}, {"a-bin": "b"}):
        with pytest.raises(RequestError, match="metadata"):
            call_metadata(None, wrong)


def test_tls_needs_both_halves_and_readable_files(tmp_path):
    with pytest.raises(RequestError, match="come together"):
        TlsConfig(certificate=b"x")
    with pytest.raises(RequestError, match=r"root .* cannot be read"):
        TlsConfig(root=tmp_path / "none.pem").credentials()


@pytest.mark.parametrize("wrong", [{"max_attempts": 0}, {"initial_backoff_s": 3}, {"multiplier": 0.5}])
def test_a_retry_policy_is_checked(wrong):
    with pytest.raises(ValueError, match=r"must be|expected"):
        RetryPolicy(**wrong)


def test_back_off_grows_to_its_bound():
    policy = RetryPolicy(max_attempts=1000, initial_backoff_s=0.1, max_backoff_s=1.0)
    error = UnavailableError("x", code=UNAVAILABLE, retryable=True)
    pauses = [policy.pause_s(attempt, error, 0.0) for attempt in range(1, 1000)]
    assert pauses[:4] == [0.05, 0.1, 0.2, 0.4]
    assert set(pauses[4:]) == {0.5}
    assert policy.pause_s(1000, error, 0.0) is None
