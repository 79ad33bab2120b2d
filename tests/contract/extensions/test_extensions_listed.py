"""ServerMetadata lists an extension if, and only if, it works: each listed one has a probe here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import TIMEOUT_S
from served import Served, serve
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with serve(models, "--model-control-mode", "explicit", "--load-model", "*", "--shared-memory", "on") as server:
        yield server


def make_tensor(library: Any, **options: Any) -> Any:
    tensor = library.InferInput("INPUT0", [1, 2], "FP32")
    return tensor.set_data_from_numpy(np.array([[1, 2]], np.float32), **options)


def probe_classification(grpc: Any, http: Any) -> None:
    for client, library in ((grpc, grpc_client), (http, http_client)):
        outputs = [library.InferRequestedOutput("OUTPUT0", class_count=1)]
        found = client.infer("identity", [make_tensor(library)], outputs=outputs).as_numpy("OUTPUT0")
        assert found.tolist() == [[b"2.000000:1"]]


def probe_model_configuration(grpc: Any, http: Any) -> None:
    assert grpc.get_model_config("identity").config.max_batch_size == 8
    assert http.get_model_config("identity")["max_batch_size"] == 8


def probe_model_repository(grpc: Any, http: Any) -> None:
    names = {model.name for model in grpc.get_model_repository_index().models}
    assert "identity" in names and names == {model["name"] for model in http.get_model_repository_index()}
    for client in (grpc, http):
        client.unload_model("column")
        assert not client.is_model_ready("column")
        client.load_model("column")
        assert client.is_model_ready("column")


def probe_unload_dependents(grpc: Any, http: Any) -> None:
    """What was only loaded because an ensemble needs it goes with the ensemble."""
    for client in (grpc, http):
        client.unload_model("outer")
        client.unload_model("inner")
        client.load_model("outer")
        assert client.is_model_ready("inner")
        client.unload_model("outer", unload_dependents=True)
        assert not client.is_model_ready("inner")
        client.load_model("inner")
        client.load_model("outer")


def probe_sequence(grpc: Any, http: Any, ids: tuple[int | str, ...] = (7, 8)) -> None:
    for (client, library), sequence_id in zip(((grpc, grpc_client), (http, http_client)), ids, strict=True):
        found = []
        for step in range(3):
            tensor = library.InferInput("INPUT0", [1, 1], "FP32").set_data_from_numpy(np.full((1, 1), step, np.float32))
            flags = {"sequence_id": sequence_id, "sequence_start": step == 0, "sequence_end": step == 2}
            found.append(client.infer("steps", [tensor], **flags).as_numpy("OUTPUT0").item())
        assert found == [100, 1, 2]
        with pytest.raises(InferenceServerException, match="must specify the START flag on the first request"):
            client.infer("steps", [tensor], sequence_id=sequence_id)


def probe_string_sequence(grpc: Any, http: Any) -> None:
    probe_sequence(grpc, http, ("seven", "acht"))


def probe_schedule_policy(grpc: Any, http: Any) -> None:
    """A request with a timeout ends by it: nobody else comes to the gate."""
    for client, library in ((grpc, grpc_client), (http, http_client)):
        with pytest.raises(InferenceServerException, match="Request timeout expired"):
            client.infer("impatient", [make_tensor(library)], timeout=2000, priority=1)


def probe_statistics(grpc: Any, http: Any) -> None:
    for client, library in ((grpc, grpc_client), (http, http_client)):
        client.infer("identity", [make_tensor(library)])
    (statistics,) = grpc.get_inference_statistics("identity").model_stats
    assert statistics.inference_stats.success.count >= 2
    assert http.get_inference_statistics("identity")["model_stats"][0]["inference_count"] >= 2


def probe_binary_tensor_data(grpc: Any, http: Any) -> None:
    """Binary and JSON tensors side by side, both ways."""
    for is_binary_in in (True, False):
        tensor = make_tensor(http_client, binary_data=is_binary_in)
        for is_binary_out in (True, False):
            outputs = [http_client.InferRequestedOutput("OUTPUT0", binary_data=is_binary_out)]
            result = http.infer("identity", [tensor], outputs=outputs)
            assert result.as_numpy("OUTPUT0").tolist() == [[1, 2]]
            assert ("data" in result.get_output("OUTPUT0")) is not is_binary_out


def probe_system_shared_memory(grpc: Any, http: Any) -> None:
    for client in (grpc, http):
        with pytest.raises(InferenceServerException, match="Unable to open shared memory region: '/aiorch_test_no'"):
            client.register_system_shared_memory("r", "/aiorch_test_no", 8)


def probe_logging(grpc: Any, http: Any) -> None:
    assert grpc.update_log_settings({"log_info": False}).settings["log_info"].bool_param is False
    assert http.update_log_settings({"log_info": True})["log_info"] is True


PROBES: dict[str, Callable[[Any, Any], None]] = {
    "classification": probe_classification,
    "model_configuration": probe_model_configuration,
    "model_repository": probe_model_repository,
    "model_repository(unload_dependents)": probe_unload_dependents,
    "sequence": probe_sequence,
    "sequence(string_id)": probe_string_sequence,
    "schedule_policy": probe_schedule_policy,
    "statistics": probe_statistics,
    "binary_tensor_data": probe_binary_tensor_data,
    "system_shared_memory": probe_system_shared_memory,
    "logging": probe_logging,
}


@pytest.mark.parametrize("extension", PROBES)
def test_a_listed_extension_works(served: Served, extension: str) -> None:
    grpc = grpc_client.InferenceServerClient(served.grpc)
    http = http_client.InferenceServerClient(served.http)
    try:
        assert extension in grpc.get_server_metadata().extensions
        PROBES[extension](grpc, http)
    finally:
        grpc.close()
        http.close()


def test_every_listed_extension_has_a_probe(served: Served) -> None:
    listed = httpx.get(f"http://{served.http}/v2", timeout=TIMEOUT_S).json()["extensions"]
    assert sorted(listed) == sorted(PROBES)
