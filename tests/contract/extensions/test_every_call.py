"""Every call that tritonclient has, in its four forms, on a whole server: what one can do, the others can."""

from __future__ import annotations

import inspect
import queue
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio_client
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio_client
from running_site import TIMEOUT_S
from served import Served
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

FORMS = {"grpc": grpc_client, "grpc.aio": grpc_aio_client, "http": http_client, "http.aio": http_aio_client}
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
WORDS = np.array(["", "gr\u00fcn", "nul\0inside", "\U0001f600"], dtype=object)
Ask = Callable[..., Awaitable[Any]]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def ask(form: str, controlled: Served) -> AsyncIterator[Ask]:
    """Calls a method of the client by its name; messages come back as dictionaries, as they do over HTTP."""
    client = FORMS[form].InferenceServerClient(controlled.grpc if form.startswith("grpc") else controlled.http)

    async def ask(name: str, *arguments: Any, **options: Any) -> Any:
        method = getattr(client, name)
        if form.startswith("grpc") and "as_json" in inspect.signature(method).parameters:
            options["as_json"] = True
        answer = method(*arguments, **options)
        return await answer if inspect.isawaitable(answer) else answer

    yield ask
    if inspect.isawaitable(closed := client.close()):
        await closed


def build(form: str, values: Any = VALUES, datatype: str = "FP32") -> Any:
    tensor = FORMS[form].InferInput("INPUT0", list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


async def fail(answer: Awaitable[Any]) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        await answer
    return str(caught.value.status()).removeprefix("StatusCode."), str(caught.value.message())


@pytest.mark.proves("ServerLive", "ServerReady", "ModelReady", by="tritonclient.*")
async def test_health(ask: Ask) -> None:
    assert await ask("is_server_live") is True
    assert await ask("is_server_ready") is True
    found = [await ask("is_model_ready", *model) for model in [("identity",), ("identity", "1"), ("identity", "2")]]
    assert found == [True, True, False]
    assert await ask("is_model_ready", "nobody") is False


@pytest.mark.proves("ServerMetadata", "ModelMetadata", "ModelConfig", by="tritonclient.*")
async def test_metadata(ask: Ask) -> None:
    server = await ask("get_server_metadata")
    assert server["name"] == "aiorchestrator" and "statistics" in server["extensions"]
    metadata = await ask("get_model_metadata", "scores_FP32", "1")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("scores_FP32", ["1"], "identity")
    (tensor,) = metadata["inputs"]
    assert (tensor["name"], tensor["datatype"], list(map(int, tensor["shape"]))) == ("INPUT0", "FP32", [-1, -1, -1])
    config = await ask("get_model_config", "scores_FP32", "1")
    config = config.get("config", config)
    assert (config["name"], config["max_batch_size"], config["output"][0]["label_filename"]) == (
        *("scores_FP32", 8, "labels.txt"),
    )


@pytest.mark.proves("ModelStatistics", by="tritonclient.*")
async def test_statistics(ask: Ask, form: str) -> None:
    async def count() -> tuple[int, int]:
        (told,) = (await ask("get_inference_statistics", "identity"))["model_stats"]
        return int(told.get("inference_count", 0)), int(told["inference_stats"]["success"].get("count", 0))

    rows, requests = await count()
    await ask("infer", "identity", [build(form)])
    assert await count() == (rows + 2, requests + 1)
    names = {each["name"] for each in (await ask("get_inference_statistics"))["model_stats"]}
    assert {"identity", "text"} <= names


@pytest.mark.proves("Repository*", by="tritonclient.*")
async def test_repository(ask: Ask) -> None:
    async def index() -> dict[str, str]:
        told = await ask("get_model_repository_index")
        return {each["name"]: each.get("state", "") for each in (told["models"] if isinstance(told, dict) else told)}

    assert (await index())["column"] != "READY"
    await ask("load_model", "column", config='{"backend": "identity", "max_batch_size": "3"}')
    config = await ask("get_model_config", "column")
    assert config.get("config", config)["max_batch_size"] == 3
    assert (await index())["column"] == "READY"
    await ask("unload_model", "column", unload_dependents=True)
    assert await ask("is_model_ready", "column") is False
    code, text = await fail(ask("load_model", "nobody"))
    assert (code in ("INTERNAL", "500"), text) == (
        True,
        "failed to load 'nobody', failed to poll from model repository",
    )


@pytest.mark.proves("TraceSetting", "LogSettings", by="tritonclient.*")
async def test_settings(ask: Ask) -> None:
    def plain(told: dict[str, Any], key: str) -> list[str]:
        value = told.get("settings", told)[key]
        if isinstance(value, dict):
            (value,) = value.values()
        return [str(each) for each in (value if isinstance(value, list) else [value])]

    assert plain(await ask("update_trace_settings", "identity", {"trace_rate": "7"}), "trace_rate") == ["7"]
    assert plain(await ask("get_trace_settings", "identity"), "trace_rate") == ["7"]
    await ask("update_trace_settings", "identity", {"trace_rate": None})
    assert plain(await ask("get_trace_settings"), "trace_rate") != ["7"]
    assert plain(await ask("update_log_settings", {"log_verbose_level": 1}), "log_verbose_level") == ["1"]
    assert plain(await ask("get_log_settings"), "log_verbose_level") == ["1"]
    assert plain(await ask("update_log_settings", {"log_verbose_level": 0}), "log_verbose_level") == ["0"]


@pytest.mark.proves("ModelInfer", by="tritonclient.*")
async def test_infer(ask: Ask, form: str) -> None:
    output = FORMS[form].InferRequestedOutput("OUTPUT0")
    for array, datatype, model in ((VALUES, "FP32", "identity"), (WORDS, "BYTES", "text")):
        tensor = build(form, array, datatype)
        result = await ask("infer", model, [tensor], "1", outputs=[output], request_id="\u2116 1", parameters={"a": 1})
        response = result.get_response()
        id = response["id"] if form.startswith("http") else response.id
        assert id == "\u2116 1"
        found = result.as_numpy("OUTPUT0")
        wanted = [word.encode() for word in array] if datatype == "BYTES" else array.tolist()
        assert found.tolist() == wanted
    code, text = await fail(ask("infer", "nobody", [build(form)]))
    assert (code in ("INVALID_ARGUMENT", "400"), text) == (True, "Request for unknown model: 'nobody' is not found")


@pytest.mark.proves("SystemSharedMemory*", by="tritonclient.*")
async def test_system_shared_memory(ask: Ask, form: str, new_key: Callable[[str], str]) -> None:
    """Both directions through one region."""
    name, key = f"every {form}", new_key(f"every_{form}")
    size = VALUES.nbytes
    handle = shm.create_shared_memory_region(name, key, 2 * size, create_only=True)
    try:
        shm.set_shared_memory_region(handle, [VALUES])
        await ask("register_system_shared_memory", name, key, 2 * size)
        told = await ask("get_system_shared_memory_status", name)
        (region,) = told["regions"].values() if "regions" in told else told
        assert (region["name"], region["key"], int(region["byte_size"])) == (name, key, 2 * size)
        tensor = FORMS[form].InferInput("INPUT0", [2, 3], "FP32")
        tensor.set_shared_memory(name, size)
        output = FORMS[form].InferRequestedOutput("OUTPUT0")
        output.set_shared_memory(name, size, size)
        await ask("infer", "identity", [tensor], outputs=[output])
        assert (shm.get_contents_as_numpy(handle, np.float32, [2, 3], size) == VALUES).all()
        await ask("unregister_system_shared_memory", name)
        code, text = await fail(ask("get_system_shared_memory_status", name))
        assert (code in ("NOT_FOUND", "404"), text) == (
            *(True, f"Unable to find system shared memory region: '{name}'"),
        )
    finally:
        await ask("unregister_system_shared_memory")
        shm.destroy_shared_memory_region(handle)


@pytest.mark.proves("CudaSharedMemory*", by="tritonclient.*")
async def test_cuda_shared_memory(ask: Ask) -> None:
    """Without a GPU there is nothing to register, and nothing to find."""
    code, text = await fail(ask("register_cuda_shared_memory", "r", b"aGFuZGxl", 0, 64))
    assert code in ("UNAVAILABLE", "503") and "this server has no GPU" in text
    assert not await ask("get_cuda_shared_memory_status")
    await ask("unregister_cuda_shared_memory", "r")
    await ask("unregister_cuda_shared_memory")


@pytest.mark.proves("ModelStreamInfer", by="tritonclient.grpc")
def test_a_stream(controlled: Served) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc_client.InferenceServerClient(controlled.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for model in ("identity", "nobody", "identity"):
            client.async_stream_infer(model, [build("grpc")], request_id=model)
        client.stop_stream()
    found = [answers.get(timeout=TIMEOUT_S) for _ in range(3)]
    assert [error is None for _, error in found] == [True, False, True]
    assert (found[2][0].as_numpy("OUTPUT0") == VALUES).all()


@pytest.mark.proves("ModelStreamInfer", by="tritonclient.grpc.aio")
async def test_an_asyncio_stream(controlled: Served) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for model in ("identity", "nobody", "identity"):
            yield {"model_name": model, "inputs": [build("grpc.aio")], "request_id": model}

    async with grpc_aio_client.InferenceServerClient(controlled.grpc) as client:
        found = [answer async for answer in client.stream_infer(requests())]
    assert [error is None for _, error in found] == [True, False, True]
    assert (found[2][0].as_numpy("OUTPUT0") == VALUES).all()
