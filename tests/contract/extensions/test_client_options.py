"""Ways to connect and to call that Triton's example programs show: keep-alive, channel arguments, headers, reuse."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import TIMEOUT_S, Site

VALUES = np.array([[1, 2, 3]], np.float32)


def make_tensor(library: Any) -> Any:
    return library.InferInput("INPUT0", [1, 3], "FP32").set_data_from_numpy(VALUES)


@pytest.mark.parametrize(
    "options",
    [
        {
            "keepalive_options": grpc_client.KeepAliveOptions(
                keepalive_time_ms=200,
                keepalive_timeout_ms=1000,
                keepalive_permit_without_calls=True,
                http2_max_pings_without_data=2,
            )
        },
        {"channel_args": [("grpc.max_send_message_length", 2**31 - 1), ("grpc.lb_policy_name", "pick_first")]},
    ],
    ids=["keepalive", "channel arguments"],
)
def test_channels(site: Site, options: Any) -> None:
    client = grpc_client.InferenceServerClient(site.target, **options)
    for _ in range(3):
        result = client.infer("identity", [make_tensor(grpc_client)], headers={"test": "1"}, client_timeout=TIMEOUT_S)
        assert (result.as_numpy("OUTPUT0") == VALUES).all()
    client.close()


@pytest.mark.parametrize("coding", ["gzip", "deflate", None])
def test_packed_both_ways(site: Site, coding: str | None) -> None:
    grpc = grpc_client.InferenceServerClient(site.target)
    found = grpc.infer("identity", [make_tensor(grpc_client)], compression_algorithm=coding).as_numpy("OUTPUT0")
    assert (found == VALUES).all()
    grpc.close()
    http = http_client.InferenceServerClient(site.http)
    for answered in ("gzip", "deflate", None):
        found = http.infer(
            "identity",
            [make_tensor(http_client)],
            headers={"test": "1"},
            query_params={"test_1": 1},
            request_compression_algorithm=coding,
            response_compression_algorithm=answered,
        ).as_numpy("OUTPUT0")
        assert (found == VALUES).all()
    http.close()


def test_one_set_of_objects_for_all_calls(site: Site) -> None:
    """Inputs and outputs are used again, for calls of every kind and for other bytes."""
    client = grpc_client.InferenceServerClient(site.target)
    tensor, outputs = make_tensor(grpc_client), [grpc_client.InferRequestedOutput("OUTPUT0")]
    answers: queue.Queue[Any] = queue.Queue()

    def put(result: Any, error: Any) -> None:
        answers.put((result, error))

    client.start_stream(put)
    for factor in (1, 2, 3):
        tensor.set_data_from_numpy(VALUES * factor)
        assert (client.infer("identity", [tensor], outputs=outputs).as_numpy("OUTPUT0") == VALUES * factor).all()
        for start in (
            lambda: client.async_infer("identity", [tensor], put, outputs=outputs),
            lambda: client.async_stream_infer("identity", [tensor], outputs=outputs),
        ):
            start()
            result, error = answers.get(timeout=TIMEOUT_S)
            assert error is None and (result.as_numpy("OUTPUT0") == VALUES * factor).all()
    client.stop_stream()
    client.close()
