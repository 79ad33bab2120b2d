"""Names, ids, parameters and tensors that hold what text can hold: 10,000 characters, NUL, every plane of Unicode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from served import Served, serve
from tritonclient.utils import InferenceServerException

CONFIG = """backend: "identity" max_batch_size: 0
    input { name: "A" data_type: TYPE_STRING dims: [-1] } output { name: "X" data_type: TYPE_STRING dims: [-1] }"""
TEXTS = {
    "long": "x" * 10_000,
    "long and wide": "\u20ac" * 10_000,
    "nul": "a\0b",
    "deep": '{"a":[' * 5000,
    "numbers": '{"max_batch_size": 1' + "0" * 5000 + ', "version_policy": 1e999}',
    "planes": "\U0001f600 e\u0301 \uffff",
    "lines": "a\r\nERROR 2026 a line of the log? \x1b[31m\x7f\x85\u2028",
    "backwards": "\u202eabc\u2066",
    "path": "../..//etc/passwd?x=1#y%2e",
    "format": "%s %n {0} ${x} `x` 'x' \"x\" \\",
}
#: As long as an error's text may be, in characters.
LONGEST = 4500


@pytest.fixture(scope="module", params=["native", "grpcio"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("models")
    (root / "text" / "1").mkdir(parents=True)
    (root / "text" / "config.pbtxt").write_text(CONFIG)
    options = ("--model-control-mode", "explicit", "--load-model", "text", "--shared-memory", "on")
    with serve(root, *options, "--transport", request.param) as server:
        told: list[bytes] = []
        # what the server announces has to be read, or the rest is left out
        reading = threading.Thread(target=lambda: told.append(server.process.stdout.read()))  # type: ignore[union-attr]
        reading.start()
        yield server
        server.end()
        reading.join()
        lines = server.log.read_bytes().decode().splitlines()
        for line in (*lines, *told[0].decode().splitlines()):
            assert len(line) <= LONGEST, line[:500]
        # one line for each record, and nothing that moves a terminal's cursor; a sanitizer's settings are passed over
        assert all(line.startswith(("20", "environment AIORCH_")) for line in lines), lines
        assert not any(sign in "".join(lines) for sign in "\x1b\0\x7f")


@pytest.fixture(params=["grpc", "rest"])
def client(request: pytest.FixtureRequest, served: Served) -> Iterator[Any]:
    library = http_client if request.param == "rest" else grpc_client
    client = library.InferenceServerClient(served.http if request.param == "rest" else served.grpc)
    client.library = library
    yield client
    assert infer(client, "after").as_numpy("X").tolist() == [b"after"]
    client.close()


def infer(client: Any, *words: str, name: str = "A", output: str = "X", model: str = "text", **options: Any) -> Any:
    tensor = client.library.InferInput(name, [len(words)], "BYTES")
    tensor.set_data_from_numpy(np.array([word.encode() for word in words], object))
    return client.infer(model, [tensor], outputs=[client.library.InferRequestedOutput(output)], **options)


#: Where a text names something that there is not.
PLACES: dict[str, Callable[[Any, str], Any]] = {
    "model": lambda client, text: infer(client, "a", model=text),
    "version": lambda client, text: infer(
        client, "a", model_version=quote(text, safe="") if client.library is http_client else text
    ),
    "input": lambda client, text: infer(client, "a", name=text),
    "output": lambda client, text: infer(client, "a", output=text),
    "metadata": lambda client, text: client.get_model_metadata(text),
    "config": lambda client, text: client.get_model_config(text),
    "statistics": lambda client, text: client.get_inference_statistics(text),
    "load": lambda client, text: client.load_model(text),
    "load, config": lambda client, text: client.load_model("text", config=text),
    "load, file": lambda client, text: client.load_model("text", config="{}", files={f"file:{text}": b"a"}),
    "region": lambda client, text: client.get_system_shared_memory_status(text),
    "key": lambda client, text: client.register_system_shared_memory("r", text, 8),
    "trace": lambda client, text: client.get_trace_settings(text),
    "setting": lambda client, text: client.update_log_settings({text: True}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", TEXTS)
def test_names_of_nothing(client: Any, place: str, text: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        PLACES[place](client, TEXTS[text])
    message = str(caught.value.message())
    assert 0 < len(message) <= LONGEST, message[:500]
    codes = ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "INTERNAL")
    assert str(caught.value.status()) in (*(f"StatusCode.{code}" for code in codes), "400", "404", "500", "501", "414")
    assert "internal error" not in message


@pytest.mark.parametrize("text", TEXTS)
def test_tensors_ids_and_parameters(client: Any, text: str) -> None:
    """What comes in goes out, and a parameter that nobody knows does no harm."""
    given = TEXTS[text]
    result = infer(client, given, "", given, request_id=given[:1000], parameters={given[:100]: given})
    assert result.as_numpy("X").tolist() == [given.encode(), b"", given.encode()]
    response = result.get_response()
    assert (response["id"] if client.library is http_client else response.id) == given[:1000]
