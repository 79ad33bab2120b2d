"""Calls that need a header at the gRPC doors, and every way round it that anybody has thought of."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import tritonclient.grpc as grpc_client
from running_site import TIMEOUT_S, Site, encode_values
from tritonclient.utils import InferenceServerException

from aiorch_server.config.restriction import Group
from aiorch_server.frontends.grpc import FAST_PATH
from aiorch_server.frontends.grpc.restricted import GROUPS

from .conftest import (
    ALL,
    CALLS,
    DOORS,
    PREFIX,
    Pairs,
    ask,
    fill,
    let_in,
    refusal_of,
    secret_of,
)


def list_wrong(group: str) -> list[Pairs]:
    name, right = PREFIX + group, secret_of(group)
    others = tuple(pair for pair in ALL if pair[0] != name)
    return [
        others,
        (*others, (name, "wrong")),
        (*others, (name, "")),
        (*others, (name, right.upper())),
        (*others, (name, right[:-2])),
        (*others, (name, right + "1")),
        (*others, (name, right), (name, "wrong")),
        (*others, (name, "wrong"), (name, right)),
        (*others, (name, right), (name, "")),
        (*others, (f"key-{group}", right)),
        (*others, (f"{name}x", right)),
    ]


@pytest.mark.parametrize("path", GROUPS)
def test_every_method_needs_its_headers(site: Site, path: str) -> None:
    with grpc.insecure_channel(site.target) as channel:
        for group in GROUPS[path]:
            for metadata in list_wrong(group):
                assert ask(channel, path, metadata) == refusal_of(group), metadata
        groups = set(GROUPS[path])
        right = tuple(pair for pair in ALL if pair[0].removeprefix(PREFIX) in groups)
        for metadata in (right, right * 2):
            assert "restricted" not in ask(channel, path, metadata)[1]
        assert ask(channel, path) == refusal_of(GROUPS[path][0])


def test_every_method_that_is_served_has_its_group(site: Site) -> None:
    served: set[str] = set(getattr(site.application._grpc, "_registered", GROUPS))
    assert served == set(GROUPS)
    assert {group for groups in GROUPS.values() for group in groups} == set(Group)


@pytest.mark.parametrize(
    "path",
    [
        *("/inference.GRPCInferenceService/ModelInfer/", "/inference.GRPCInferenceService/modelinfer"),
        *("//inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelInfer?x=1"),
        *("/inference.GRPCInferenceService/Model%49nfer", "/GRPCInferenceService/ModelInfer", "/nobody.Nothing/Call"),
    ],
)
def test_other_ways_to_write_a_method_lead_nowhere(site: Site, path: str) -> None:
    with grpc.insecure_channel(site.target) as channel:
        assert ask(channel, path, message=encode_values([1.0]))[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize("message", [encode_values([1.0]), encode_values([1.0], "nobody"), b"\xff", bytes(1 << 20)])
def test_a_refusal_says_nothing_about_models(site: Site, message: bytes) -> None:
    with grpc.insecure_channel(site.target) as channel:
        for name in ("ModelInfer", "ModelStreamInfer"):
            answer = ask(channel, f"/inference.GRPCInferenceService/{name}", message=message)
            assert answer == refusal_of("inference")


def test_the_message_is_not_waited_for(site: Site) -> None:
    silent: queue.Queue[bytes | None] = queue.Queue()
    with grpc.insecure_channel(site.target) as channel:
        for path in (FAST_PATH, "/grpc.health.v1.Health/Check"):
            call = channel.stream_stream(path)(iter(silent.get, None), timeout=TIMEOUT_S)
            with pytest.raises(grpc.RpcError):
                next(call)
            assert (call.code().name, call.details()) == refusal_of(GROUPS[path][0])
            silent.put(None)


def test_packed_messages_are_not_unpacked_first(site: Site) -> None:
    with grpc.insecure_channel(site.target, compression=grpc.Compression.Gzip) as channel:
        assert ask(channel, FAST_PATH, message=encode_values([1.0] * 1000)) == refusal_of("inference")


@pytest.mark.parametrize("group", Group)
def test_tritonclient_over_grpc(site: Site, group: Group) -> None:
    with grpc_client.InferenceServerClient(site.target) as client:
        for call in (call for own, call in CALLS if own == group):
            for headers in ({}, {PREFIX + group: "wrong"}):
                with pytest.raises(InferenceServerException) as caught:
                    call(grpc_client, client, headers)
                assert (caught.value.status(), caught.value.message()) == (
                    "StatusCode.UNAVAILABLE",
                    refusal_of(group)[1],
                )
            assert let_in(call, grpc_client, client, {PREFIX + group: secret_of(group)}) is not False


def test_a_stream_is_refused_as_a_whole(site: Site) -> None:
    for headers in ({}, {PREFIX + "inference": "wrong"}):
        with grpc_client.InferenceServerClient(site.target) as client:
            assert stream_once(client, headers) == refusal_of("inference")[1]
    with grpc_client.InferenceServerClient(site.target) as client:
        assert stream_once(client, {PREFIX + "inference": secret_of("inference")}) is None


def stream_once(client: Any, headers: dict[str, str]) -> str | None:
    """The first error of a stream, None when its request was answered."""
    told: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: told.put(error), headers=headers)
    try:
        client.async_stream_infer("identity", fill(grpc_client))
        error = told.get(timeout=TIMEOUT_S)
    except InferenceServerException:  # the stream was over before
        error = told.get(timeout=TIMEOUT_S)
    finally:
        client.stop_stream()
    return None if error is None else str(error.message())


@pytest.mark.parametrize("door", DOORS)
def test_what_is_not_restricted_is_as_before(open_site: Callable[..., Site], door: str) -> None:
    """Two groups with one header: the others go on, ModelInfer on the compiled path."""
    site = open_site(door, ("logging,model-repository:admin=a:b=c",))
    with grpc.insecure_channel(site.target) as channel:
        header = (("triton-grpc-protocol-admin", "a:b=c"),)
        for path, groups in GROUPS.items():
            is_restricted = bool({Group.LOGGING, Group.MODEL_REPOSITORY} & set(groups))
            assert ("restricted" in ask(channel, path)[1]) is is_restricted, path
            assert "restricted" not in ask(channel, path, header)[1]
        assert ask(channel, FAST_PATH, message=encode_values([1.0])) == ("OK", "")
    if door != "grpcio":
        assert site.application._grpc._fast_path == FAST_PATH


@pytest.mark.parametrize("door", ["threads", "loop"])
def test_the_compiled_path_ends_where_inference_is_restricted(open_site: Callable[..., Site], door: str) -> None:
    site = open_site(door, ("inference:k=v",))
    assert site.application._grpc._fast_path == ""
    with grpc.insecure_channel(site.target) as channel:
        path, message = FAST_PATH, encode_values([1.0])
        assert ask(channel, path, message=message)[0] == "UNAVAILABLE"
        assert ask(channel, path, (("triton-grpc-protocol-k", "v"),), message) == ("OK", "")
        assert ask(channel, path, message=message)[0] == "UNAVAILABLE"
