"""The compiled desk and the desk with words decide alike."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiorch_server._core import Mailbox, ModelSpec, Scheduler, encode_request
from aiorch_server.errors import AiorchError, InternalError, RequestError
from aiorch_server.types import DataType, InferenceRequest, ModelSignature, RequestedOutput, Tensor, TensorSpec
from aiorch_server.validation import check_request

INPUTS = (
    TensorSpec("A", DataType.FP32, (2,)),
    TensorSpec("B", DataType.INT8, (-1, 2)),
    TensorSpec("T", DataType.BYTES, (-1,), optional=True),
    TensorSpec("S", DataType.BOOL, (), optional=True),
)
OUTPUTS = (TensorSpec("Y", DataType.FP32, (2,)), TensorSpec("Z", DataType.FP32, (2,)))


def elements(*texts: bytes) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


shape_numbers = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 2**31, 2**62, 2**63 - 1, -(2**63)])
tensors = st.builds(
    Tensor,
    name=st.sampled_from(["A", "B", "T", "S", "Q"]),
    datatype=st.sampled_from(["FP32", "INT8", "BYTES", "BOOL", ""]),
    shape=st.lists(shape_numbers, max_size=4).map(tuple),
    data=st.one_of(
        st.sampled_from([0, 1, 2, 4, 8, 16, 24]).map(bytes),
        st.lists(st.binary(max_size=3), max_size=4).map(lambda texts: elements(*texts)),
        st.binary(max_size=9),
    ),
)


@st.composite
def nearly_right(draw: st.DrawFn) -> list[Tensor]:
    """A right request with at most one thing changed."""
    rows = draw(st.integers(1, 4))
    free = draw(st.integers(0, 3))
    texts = draw(st.lists(st.binary(max_size=3), min_size=rows * free, max_size=rows * free))
    given_ = [
        Tensor("A", "FP32", (rows, 2), bytes(8 * rows)),
        Tensor("B", "INT8", (rows, free, 2), bytes(2 * rows * free)),
        Tensor("T", "BYTES", (rows, free), elements(*texts)),
        Tensor("S", "BOOL", (rows,), bytes(rows)),
    ][: draw(st.integers(1, 4))]
    if draw(st.booleans()):
        given_[draw(st.integers(0, len(given_) - 1))] = draw(tensors)
    return draw(st.permutations(given_))


@pytest.mark.parametrize("max_batch_size", [0, 4])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    given_=st.one_of(nearly_right(), st.lists(tensors, min_size=1, max_size=5)),
    outputs=st.lists(st.sampled_from(["Y", "Z", "W"]), max_size=2),
)
def test_both_desks_decide_alike(max_batch_size: int, given_: list[Tensor], outputs: list[str]) -> None:
    signature = ModelSignature(INPUTS, OUTPUTS, max_batch_size)
    request = InferenceRequest("m", "", given_, [RequestedOutput(name) for name in outputs])
    try:
        check_request(request, "m", signature)
        is_right = True
    except RequestError:
        is_right = False
    assert is_accepted(signature, request) == is_right


def is_accepted(signature: ModelSignature, request: InferenceRequest) -> bool:
    message = encode_request(
        "m",
        "",
        "",
        [(tensor.name, tensor.datatype, tensor.shape, tensor.data or b"") for tensor in request.inputs],
        [output.name for output in request.outputs],
    )

    async def submit() -> bool:
        mailbox = Mailbox(asyncio.get_running_loop())
        try:
            mailbox.submit(Scheduler(ModelSpec("m", 1, signature)), message).cancel()
        except InternalError:
            return False
        finally:
            mailbox.close()
        return True

    return asyncio.run(submit())


A = Tensor("A", "FP32", (1, 2), bytes(8))
B = Tensor("B", "INT8", (1, 1, 2), bytes(2))
TEXTS = [
    ([A], "expected number of inputs between 2 and 4 but got 1 inputs for model 'm'. Got input(s) ['A'], but missing "
     "required input(s) ['B']. Please provide all required input(s)."),
    ([A, B, Tensor("Q", "FP32", (1,), b"")], "unexpected inference input 'Q' for model 'm'"),
    ([A, B, B], "input 'B' is given 2 times for model 'm'"),
    ([Tensor("A", "FP64", (1, 2), bytes(16)), B],
     "inference input 'A' data-type is 'FP64', but model 'm' expects 'FP32'"),
    ([Tensor("A", "FP32", (1, 3), bytes(12)), B],
     "unexpected shape for input 'A' for model 'm'. Expected [-1,2], got [1,3]. NOTE: "),
    ([Tensor("A", "FP32", (1, -2), bytes(8)), B],
     "unexpected shape for input 'A' for model 'm'. Expected [-1,2], got [1,-2]. NOTE: "),
    ([Tensor("A", "FP32", (5, 2), bytes(40)), B], "inference request batch-size must be <= 4 for 'm'"),
    ([A, Tensor("B", "INT8", (2, 1, 2), bytes(4))],
     "input 'B' batch size does not match other inputs for 'm': 2 against 1"),
    ([Tensor("A", "FP32", (1, 2), bytes(12)), B],
     "input byte size mismatch for input 'A' for model 'm'. Expected 8, got 12"),
    ([Tensor("A", "FP32", (1, 2), None), B],
     "unable to find data for input tensor 'A' for model 'm' in request."),
    ([A, B, Tensor("T", "BYTES", (1, 1), b"\x09\0\0\0abc")],
     "incomplete string data for inference input 'T' for model 'm', expecting string of length 9 but only 3 bytes"),
    ([A, B, Tensor("T", "BYTES", (1, 1), b"\x09\0")],
     "incomplete string length indicator for inference input 'T' for model 'm', expecting 4 bytes but only 2 bytes"),
    ([A, Tensor("B", "INT8", (1, 0, 2), b""), Tensor("T", "BYTES", (1, 0), b"a")],
     "incomplete string length indicator for inference input 'T' for model 'm', expecting 4 bytes but only 1 bytes"),
    ([A, B, Tensor("T", "BYTES", (1, 2), elements(b"a"))],
     "unexpected number of string elements 1 for inference input 'T' for model 'm', expecting 2"),
    ([A, B, Tensor("T", "BYTES", (1, 1), elements(b"a", b"b"))],
     "unexpected number of string elements more than 1 for inference input 'T' for model 'm', expecting 1"),
]  # fmt: skip


@pytest.mark.parametrize(("given_", "text"), TEXTS)
def test_the_words(given_: list[Tensor], text: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_request(InferenceRequest("m", "", given_), "m", ModelSignature(INPUTS, OUTPUTS, 4))
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"triton_secret": True}, "parameter 'triton_secret' is refused"),
        ({"priority": -1}, "parameter 'priority' must be an integer of at least 0"),
        ({"timeout": "soon"}, "parameter 'timeout' must be an integer of at least 0"),
        ({"timeout": True}, "parameter 'timeout' must be an integer of at least 0"),
    ],
)
def test_parameters_that_are_refused(parameters: dict[str, object], text: str) -> None:
    with pytest.raises(AiorchError, match=text):
        check_request(InferenceRequest("m", "", [A, B], parameters=parameters), "m", ModelSignature(INPUTS, OUTPUTS, 4))


def test_parameters_that_are_understood() -> None:
    parameters = {"priority": 2, "timeout": 7, "triton_enable_empty_final_response": True, "mine": "x"}
    terms = check_request(
        InferenceRequest("m", "", [A, B], parameters=parameters), "m", ModelSignature(INPUTS, OUTPUTS, 4)
    )
    assert (terms.priority, terms.timeout_us) == (2, 7)


def test_no_input_at_all_is_too_few() -> None:
    optional = ModelSignature((TensorSpec("T", DataType.BYTES, (-1,), optional=True),), OUTPUTS, 0)
    with pytest.raises(RequestError, match="expected at least one input for model 'm' but got none"):
        check_request(InferenceRequest("m", "", []), "m", optional)


@pytest.mark.parametrize("size", [2**31, 2**62, 2**70])
def test_an_empty_tensor_of_astronomic_size_is_refused(size: int) -> None:
    loose = ModelSignature((TensorSpec("L", DataType.FP32, (-1, -1)),), OUTPUTS, 4)
    check_request(InferenceRequest("m", "", [Tensor("L", "FP32", (1, 0, 2**31 - 1), b"")]), "m", loose)
    with pytest.raises(RequestError, match="of the empty input 'L' for model 'm' is too large"):
        check_request(InferenceRequest("m", "", [Tensor("L", "FP32", (1, 0, size), b"")]), "m", loose)


def test_a_flood_of_strings_is_checked_in_no_time() -> None:
    count = 4_000_000
    request = InferenceRequest("m", "", [A, B, Tensor("T", "BYTES", (1, count), bytes(4 * count) + b"x")])
    start = time.process_time()
    with pytest.raises(RequestError, match="incomplete string length indicator"):
        check_request(request, "m", ModelSignature(INPUTS, OUTPUTS, 4))
    # over a second, element by element in Python: the event loop would stand still for so long
    assert time.process_time() - start < 0.3
