"""What makes a request with examples slow to parse is counted on its bytes, whatever way it is written."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiorch_proto.tfserving import serving_pb2 as pb

from aiorch_server.errors import Code, PayloadTooLarge
from aiorch_server.frontends.tfserving import feature_count, registration
from aiorch_server.frontends.tfserving.feature_count import check_features

REQUESTS = (pb.ClassificationRequest, pb.RegressionRequest, pb.MultiInferenceRequest)
LIMIT = 10


@pytest.fixture(autouse=True)
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_count, "MOST_FEATURES", LIMIT)
    monkeypatch.setattr(feature_count, "SMALL_BYTES", 0)


def write(request_class: Any, *, with_context: bool, examples: int, features: int) -> bytes:
    rows = pb.Input()
    listed = rows.example_list_with_context if with_context else rows.example_list
    for _ in range(examples):
        listed.examples.add().features.SetInParent()
    target = listed.context if with_context else listed.examples[0]
    for index in range(features):
        target.features.feature[str(index)].int64_list.value.append(1 << 40)
    request = request_class(input=rows)
    if request_class is not pb.MultiInferenceRequest:
        request.model_spec.name = "m"
        request.model_spec.version.value = 1
    return bytes(request.SerializeToString())


@pytest.mark.parametrize("request_class", REQUESTS)
@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize(("examples", "features"), [(1, 8), (9, 1), (1, 9), (10, 1), (3, 8)])
def test_examples_and_features_are_counted(request_class, with_context, examples, features) -> None:
    message = write(request_class, with_context=with_context, examples=examples, features=features)
    count = examples + features + with_context  # a context is an example too
    if count <= LIMIT:
        check_features(message)
        return
    with pytest.raises(PayloadTooLarge, match=f"more examples and features than {LIMIT}"):
        check_features(message)


def test_parts_sent_apart_add_up() -> None:
    part = write(pb.ClassificationRequest, with_context=False, examples=1, features=5)
    check_features(part)
    with pytest.raises(PayloadTooLarge):
        check_features(part + part)


def test_a_group_does_not_hide_what_is_behind_it() -> None:
    part = write(pb.ClassificationRequest, with_context=False, examples=1, features=LIMIT)
    with pytest.raises(PayloadTooLarge):
        check_features(b"\x1b\x08\x01\x1c" + part)


@pytest.mark.parametrize("field", [b"\x12\x00", b"\x12\x02\x12\x00", b"\x18\x00", b"\x1b", b"\x1a\x00", b"\x1d1234"])
def test_fields_without_features_have_an_end_too(field) -> None:
    """Each of them takes time here, and 64 MiB have room for 32 million."""
    with pytest.raises(PayloadTooLarge, match="fields beside its examples and features"):
        check_features(field * (2 * LIMIT + 1))
    check_features(field * LIMIT)


@pytest.mark.parametrize("message", [b"", b"\x12", b"\x12\x05\x0a", b"\xff" * 20, b"\x0f", b"\x12\xff\xff\xff\xff\x0f"])
def test_what_is_no_message_is_left_to_the_parser(message) -> None:
    check_features(message)


@pytest.mark.parametrize("name", ["Classify", "Regress", "MultiInference"])
async def test_the_door_refuses_before_it_parses(name, monkeypatch) -> None:
    services: dict[str, Any] = {}
    monkeypatch.setattr(registration, "add_methods", lambda server, service, methods: services.update(methods))
    registration.add_serving_services(None, None, None, max_tensor_bytes=1)  # type: ignore[arg-type]
    told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def abort(code: Any, text: str, trailing_metadata: Any = ()) -> None:
        told.set_result((code, text))
        raise RuntimeError

    context = SimpleNamespace(abort=abort, invocation_metadata=tuple, time_remaining=lambda: None)
    # Broken behind its features: who parsed it would say so.
    message = write(pb.ClassificationRequest, with_context=False, examples=1, features=LIMIT) + b"\x0f"
    with pytest.raises(RuntimeError):
        await services[name].unary_unary(message, context)
    code, text = told.result()
    number = code.value if isinstance(code, Code) else code.value[0]  # grpc's own where somebody has imported it
    assert number == Code.RESOURCE_EXHAUSTED, text
    assert "more examples and features" in text
