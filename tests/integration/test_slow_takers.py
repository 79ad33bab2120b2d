"""A client that never reads its stream holds up nobody else for long: every door, and the model's only instance."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import decoupled_models as told
import grpc
import numpy as np
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from decoupled_models import COUNT, write_decoupled
from patience import PATIENCE
from running_site import Site

TIMEOUT_S = 20.0 * PATIENCE
STALL_S = 0.4
#: Far more than what fits between a model and a client that does not read.
MANY, WIDE = 2_000, 20_000


@pytest.fixture(scope="module", params=["native", "grpcio"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("slow_takers")
    write_decoupled(root, "count", COUNT, "instance_group { count: 1 kind: KIND_CPU }")
    site = Site(
        root,
        io_threads=1,
        grpc={"transport": request.param},
        limits={"stream_stall_secs": STALL_S},
        metrics={"enabled": True, "host": "127.0.0.1", "port": 0},
    )
    yield site
    site.close()


@pytest.fixture
def stub(site: Site) -> Iterator[Any]:
    with grpc.insecure_channel(site.target, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield InferenceStub(channel)


def ask(n: int, width: int, id: str) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="count", id=id)
    request.inputs.add(name="X", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.array([n, width], np.float32).tobytes())
    return request


def count_stalled(site: Site) -> int:
    (servable,) = site.application.manager.servables()
    return int(servable.statistics().stalled)


def read_all(stub: Any, n: int, id: str) -> float:
    """How long a client waited for its ``n`` answers."""
    started = time.monotonic()
    answers = [each.infer_response.raw_output_contents[0] for each in stub.ModelStreamInfer(iter([ask(n, 1, id)]))]
    assert [float(np.frombuffer(each, np.float32)[0]) for each in answers] == list(range(n))
    return time.monotonic() - started


def test_who_never_reads_is_given_up_and_the_next_is_served(site: Site, stub: Any) -> None:
    before = count_stalled(site)
    stuck = stub.ModelStreamInfer(iter([ask(MANY, WIDE, "stuck")]))
    assert next(stuck).infer_response.id == "stuck"
    read_all(stub, 3, "after")
    assert told.sent["stuck"] < MANY and "stuck" in told.cancelled
    assert count_stalled(site) == before + 1
    answers = list(stuck)  # who reads at last is told: what was on its way, and then why no more came
    assert len(answers) < MANY
    assert answers[-1].error_message == (
        f"[request id: stuck] no answer of this stream was taken for {STALL_S:g} s while its model waited to send "
        "more; take them sooner, or let the server wait longer (limits.stream_stall_secs)"
    )
    assert answers[-1].infer_response.parameters["triton_final_response"].bool_param


def test_an_event_stream_that_nobody_reads_is_given_up_too(site: Site, stub: Any) -> None:
    before = count_stalled(site)
    body = b'{"X": [%d, %d], "id": "events"}' % (MANY, WIDE)
    with socket.create_connection((site.http.split(":")[0], int(site.http.split(":")[1]))) as connection:
        connection.sendall(
            b"POST /v2/models/count/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        assert connection.recv(4) == b"HTTP"
        read_all(stub, 3, "after_events")
        assert count_stalled(site) == before + 1


def test_who_is_slow_but_reads_gets_everything(site: Site, stub: Any) -> None:
    before = count_stalled(site)
    n_read = 0
    for answer in stub.ModelStreamInfer(iter([ask(400, WIDE, "slow")])):
        assert not answer.error_message
        n_read += 1
        if n_read in (1, 150, 300):  # what lies between them is more than any buffer holds
            time.sleep(STALL_S / 2)
    assert n_read == 400 and count_stalled(site) == before


def test_who_takes_a_long_break_when_the_model_is_done_loses_nothing(site: Site, stub: Any) -> None:
    answers = stub.ModelStreamInfer(iter([ask(50, WIDE, "break")]))
    next(answers)
    time.sleep(STALL_S * 2)
    assert all(not each.error_message for each in answers)


def test_the_metric_tells(site: Site) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{site.application.metrics_port}/metrics") as answer:
        text = answer.read().decode()
    assert f'aiorch_stalled_streams_total{{model="count",version="1"}} {float(count_stalled(site))}' in text
