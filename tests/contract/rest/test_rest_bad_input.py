"""Wrong requests: the right status and text, nothing of our insides, and the next request is answered."""

import base64
import gzip
import json
import zlib

import pytest

from aiorch_server.errors import InternalError, ModelExecutionError, RequestCancelled

MODEL = "echo"
INFER = f"/v2/models/{MODEL}/infer"
GOOD = {"inputs": [{"name": "IN", "shape": [2], "datatype": "INT32", "data": [1, 2]}]}
LENGTH = "Inference-Header-Content-Length"


def with_input(**changes):
    document = {"name": "IN", "shape": [2], "datatype": "INT32", "data": [1, 2]} | changes
    return {"inputs": [{key: value for key, value in document.items() if value is not ...}]}


async def check(door, response, status, text):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document.keys() == {"error"} and text in document["error"], document
    assert "Traceback" not in response.text and ".py" not in response.text
    healthy = await door.post_infer(GOOD)
    assert healthy.status_code == 200 and healthy.json()["outputs"][0]["data"] == [1, 2]


DOCUMENTS = [
    ([], "the request must be a JSON object, but is an array"),
    ({}, "inputs: is missing"),
    ({"inputs": {}}, "inputs: must be an array, but is an object"),
    ({"inputs": None}, "inputs: must be an array, but is null"),
    ({"inputs": [7]}, "inputs[0]: must be an object, but is an integer"),
    (with_input(name=...), "inputs[0].name: is missing"),
    (with_input(name=5), "inputs[0].name: must be a string, but is an integer"),
    (with_input(datatype=...), "inputs[0].datatype: is missing"),
    (with_input(datatype="FP33"), 'inputs[0].datatype: "FP33" is no datatype; expected one of BOOL, UINT8'),
    (with_input(shape=...), "inputs[0].shape: is missing"),
    (with_input(shape="2"), "inputs[0].shape: must be an array, but is a string"),
    (with_input(shape=[2, "x"]), "inputs[0].shape[1]: must be an integer, but is a string"),
    (with_input(shape=[True]), "inputs[0].shape[0]: must be an integer, but is a boolean"),
    (with_input(shape=[-1, 2]), "inputs[0].shape[0]: must be from 0 to 9223372036854775807, but is -1"),
    (with_input(shape=[2**63]), "inputs[0].shape[0]: must be from 0 to"),
    (with_input(shape=[10**3000]), "but is a number of 9966 bits"),
    (with_input(shape=[2**62, 4]), "inputs[0].shape: causes the total element count to exceed"),
    (with_input(shape=[3]), "inputs[0].data: holds 2 elements, but shape [3] has 3"),
    (with_input(data=...), "inputs[0]: Input must set only one of the following fields"),
    (with_input(data=5), "inputs[0].data: must be an array, but is an integer"),
    (with_input(data=[1, 2.0]), "inputs[0].data: element 1 is a number, which is not INT32"),
    (with_input(data=[1, "2"]), "inputs[0].data: element 1 is a string, which is not INT32"),
    (with_input(data=[True, 1]), "inputs[0].data: element 0 is a boolean, which is not INT32"),
    (with_input(data=[1, None]), "inputs[0].data: element 1 is null, which is not INT32"),
    (with_input(data=[1, 2**31]), "inputs[0].data: element 1 is out of range for INT32"),
    (with_input(datatype="UINT8", data=[1, -1]), "element 1 is out of range for UINT8 (0 to 255)"),
    (with_input(datatype="FP32", data=[1.0, 1e300]), "inputs[0].data: holds a number that is too large for FP32"),
    (with_input(datatype="FP64", data=[1.0, 10**400]), "inputs[0].data: holds a number that is too large for FP64"),
    (with_input(datatype="BOOL", data=[1, 0]), "inputs[0].data: element 0 is an integer, which is not BOOL"),
    (with_input(datatype="BYTES", data=["a", 1]), "inputs[0].data: element 1 is an integer, which is not BYTES"),
    (with_input(datatype="BYTES", data=["a", "\ud800"]), "inputs[0].data: holds a string with half a surrogate pair"),
    (with_input(datatype="FP16", data=[1.0, 2.0]), "receiving FP16 data via JSON is not supported"),
    (with_input(datatype="BF16", data=[1.0, 2.0]), "receiving BF16 data via JSON is not supported"),
    (with_input(data=[[1], 2]), "inputs[0].data: arrays and elements stand side by side"),
    (with_input(name="\udfff"), "inputs[0].name: holds half a surrogate pair"),
    (with_input(parameters=[]), "inputs[0].parameters: must be an object, but is an array"),
    (with_input(parameters={"binary_data_size": 8}), "set 'data' 'binary_data_size'"),
    (with_input(parameters={"x": None}), "inputs[0].parameters.x: must be a boolean, number or string, but is null"),
    ({**GOOD, "parameters": {"deep": {}}}, "parameters.deep: must be a boolean, number or string, but is an object"),
    ({**GOOD, "parameters": {"big": 2**64}}, "parameters.big: a number of 65 bits does not fit into 64 bits"),
    ({**GOOD, "parameters": {"binary_data_output": 1}}, "parameters.binary_data_output: must be a boolean"),
    ({**GOOD, "id": 7}, "id: must be a string, but is an integer"),
    ({**GOOD, "outputs": [{"name": "IN"}, {}]}, "outputs[1].name: is missing"),
    ({**GOOD, "outputs": {}}, "outputs: must be an array, but is an object"),
    (
        {**GOOD, "outputs": [{"name": "IN", "parameters": {"binary_data": "yes"}}]},
        "outputs[0].parameters.binary_data: must be a boolean, but is a string",
    ),
]


@pytest.mark.parametrize(("document", "text"), DOCUMENTS, ids=range(len(DOCUMENTS)))
async def test_wrong_documents_are_told_by_path(door, document, text):
    response = await door.http.post(INFER, content=json.dumps(document))
    await check(door, response, 400, text)
    assert len(door.plane.requests) == 1  # only the good one that followed


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "the request is not valid JSON: Expecting value at line 1 column 1"),
        (json.dumps(GOOD).encode()[:-7], "the request is not valid JSON"),
        (b'{"inputs": [\n  {"name": "IN",}]}', "at line 2 column"),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"inputs": ' + b"1" * 5000 + b"}", "a number with too many digits"),
        (b"\x00" * 64, "the request is not valid JSON"),
    ],
)
async def test_broken_json(door, body, text):
    await check(door, await door.http.post(INFER, content=body), 400, text)


def binary_request(size, payload, *, shape=(2,), datatype="INT32"):
    document = {
        "inputs": [{"name": "IN", "shape": list(shape), "datatype": datatype, "parameters": {"binary_data_size": size}}]
    }
    head = json.dumps(document).encode()
    return head + payload, {LENGTH: str(len(head))}


@pytest.mark.parametrize(
    ("size", "payload", "text"),
    [
        (8, b"1234", f"unexpected size for input 'IN', expecting 4 additional bytes for model '{MODEL}'"),
        (4, b"12345678", f"unexpected additional input data for model '{MODEL}': 4 bytes"),
        (-1, b"", "inputs[0].parameters.binary_data_size: must be a number of bytes, 0 or more"),
        ("8", b"12345678", "inputs[0].parameters.binary_data_size: must be a number of bytes"),
        (True, b"1", "inputs[0].parameters.binary_data_size: must be a number of bytes"),
        (2**63, b"12345678", "expecting 9223372036854775800 additional bytes"),
    ],
)
async def test_binary_sizes(door, size, payload, text):
    body, headers = binary_request(size, payload)
    await check(door, await door.http.post(INFER, content=body, headers=headers), 400, text)


async def test_binary_data_without_its_header(door):
    body, _ = binary_request(8, b"")
    response = await door.http.post(INFER, content=body)
    await check(door, response, 400, "unexpected size for input 'IN', expecting 8 additional bytes")


@pytest.mark.parametrize(
    ("value", "status", "text"),
    [
        ("99999", 400, "inference header size should be in range (0, "),
        ("9" * 400, 400, "reaches beyond the body"),
        ("-5", 400, "unable to parse Inference-Header-Content-Length, got: -5"),
        ("1e3", 400, "unable to parse Inference-Header-Content-Length, got: 1e3"),
        ("\N{SUPERSCRIPT TWO}".encode("latin-1"), 400, "unable to parse Inference-Header-Content-Length"),
        ("10", 400, "the request is not valid JSON"),
        ("0", 501, "raw binary requests (Inference-Header-Content-Length: 0) are not supported"),
    ],
)
async def test_header_lengths(door, value, status, text):
    body, _ = binary_request(8, b"12345678")
    await check(door, await door.http.post(INFER, content=body, headers={LENGTH: value}), status, text)


async def test_body_over_the_limit_by_its_declared_length(door):
    response = await door.http.post(INFER, content=b"x" * (1 << 20) + b"x")
    await check(door, response, 413, "exceeds the maximum allowed size of 1048576 bytes")


async def test_body_over_the_limit_in_chunks(door):
    async def chunks():
        for _ in range(80):
            yield b"x" * 65536

    response = await door.http.post(INFER, content=chunks())
    await check(door, response, 413, "the request body exceeds the maximum allowed size of 1048576 bytes")


@pytest.mark.parametrize(
    ("document", "text"),
    [
        # a product of so many sizes is a number of a million bits: seconds, growing with the square
        (with_input(shape=[2**63 - 1] * 10_000), "inputs[0].shape: has 10000 elements, expected at most 1024"),
        ({"inputs": [GOOD["inputs"][0]] * 1025}, "inputs: has 1025 elements, expected at most 1024"),
        ({**GOOD, "outputs": [{"name": "IN"}] * 1025}, "outputs: has 1025 elements, expected at most 1024"),
        ({**GOOD, "parameters": dict.fromkeys(map(str, range(1025)), 0)}, "parameters: has 1025 elements"),
    ],
    ids=["shape", "inputs", "outputs", "parameters"],
)
async def test_lists_that_no_model_needs(door, document, text):
    response = await door.http.post(INFER, content=json.dumps(document))
    await check(door, response, 413, text)


@pytest.mark.parametrize("path", ["index", "models/echo/unload", "models/echo/load"])
async def test_documents_that_are_expensive_to_parse(door, path):
    """Less than the limit of a body, but hundreds of thousands of Python objects."""
    body = b'{"x": [' + b",".join([b"[]"] * 300_000) + b"]}"
    response = await door.http.post(f"/v2/repository/{path}", content=body)
    await check(
        door, response, 413, "elements" if path.endswith("/load") else "exceeds the maximum allowed size of 65536"
    )


async def test_a_load_may_bring_large_files(door):
    content = base64.b64encode(bytes(700_000)).decode()
    document = {"parameters": {"config": "{}", "file:1/model.onnx": content}}
    response = await door.http.post("/v2/repository/models/echo/load", json=document)
    assert response.status_code == 200, response.text
    assert door.control.calls == [("load", "echo", "{}", {"1/model.onnx": bytes(700_000)})]


async def test_json_over_its_own_limit(door):
    document = with_input(shape=[100_000], data=[100] * 100_000)
    response = await door.post_infer(document)
    await check(door, response, 413, "send large tensors in the binary data format")


async def test_binary_part_may_be_larger_than_the_json_limit(door):
    body, headers = binary_request(800_000, bytes(800_000), shape=(200_000,))
    response = await door.http.post(INFER, content=body, headers=headers | {"accept-encoding": "identity"})
    assert response.status_code == 200 and len(door.plane.requests[-1].inputs[0].data) == 800_000


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_bombs(door, coding, pack):
    bomb = pack(bytes(200 << 20))
    assert len(bomb) < 1 << 20
    response = await door.http.post(INFER, content=bomb, headers={"Content-Encoding": coding})
    await check(door, response, 413, f"the request body, unpacked with {coding}, exceeds the maximum allowed size")


@pytest.mark.parametrize(
    ("coding", "body", "status", "text"),
    [
        ("gzip", b"not gzip at all", 400, "the request body is not valid gzip data"),
        ("gzip", gzip.compress(b"x" * 500)[:-9], 400, "not valid gzip data: it ends too early"),
        ("gzip", b"", 400, "not valid gzip data: it ends too early"),
        ("deflate", b"\x00\x01", 400, "the request body is not valid deflate data"),
        ("deflate", zlib.compress(b"{}") + b"tail", 400, "4 bytes after the end of its deflate data"),
        ("br", b"{}", 501, "unsupported Content-Encoding 'br'; supported are gzip and deflate"),
    ],
)
async def test_broken_codings(door, coding, body, status, text):
    response = await door.http.post(INFER, content=body, headers={"Content-Encoding": coding})
    if status == 501:
        assert response.headers["accept-encoding"] == "gzip, deflate"
    await check(door, response, status, text)


async def test_gzip_of_several_members_is_one_body(door):
    text = json.dumps(GOOD).encode()
    body = gzip.compress(text[:10]) + gzip.compress(text[10:])
    response = await door.http.post(INFER, content=body, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 200 and response.json()["outputs"][0]["data"] == [1, 2]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", f"/v2/models/{MODEL}/versions/-1/infer", 404),
        ("POST", f"/v2/models/{MODEL}/versions/latest/infer", 404),
        ("POST", f"/v2/models/{MODEL}/versions//infer", 404),
        ("POST", "/v2/models/../infer", 404),
        ("POST", "/v2/models/..%2F..%2Fetc/infer", 404),
        ("GET", f"/v2/models/{MODEL}/versions/1.0/ready", 404),
        ("GET", f"/v2/models/{MODEL}/versions/x", 404),
        ("GET", "/v2/", 404),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v2/openapi.json", 404),
        ("POST", "/openapi.json", 405),
        ("GET", INFER, 405),
        ("POST", "/v2", 405),
        ("GET", "/v2/repository/index", 405),
        ("DELETE", f"/v2/models/{MODEL}", 405),
        ("GET", f"/v2/models/{MODEL}/generate", 405),
        ("GET", f"/v2/models/{MODEL}/generate_stream", 405),
        ("POST", f"/v2/models/{MODEL}/versions/x/generate", 404),
        ("POST", "/v2/repository/models/../load", 404),
        ("POST", f"/v2/repository/other/models/{MODEL}/load", 501),
    ],
)
async def test_wrong_paths_and_methods(door, method, path, status):
    response = await door.http.request(method, path)
    assert response.status_code == status and response.json().keys() == {"error"}
    assert not door.plane.requests and not door.control.calls
    if status == 405:
        assert response.headers["allow"]


async def test_version_of_thousands_of_digits(door):
    path = f"/v2/models/{MODEL}/versions/{'9' * 6000}"
    for response in (await door.http.get(path), await door.http.post(f"{path}/infer", json=GOOD)):
        assert response.status_code == 404 and "version 999" in response.json()["error"]
        assert len(response.content) < 5000


@pytest.mark.parametrize(
    ("path", "document", "text"),
    [
        (f"/v2/repository/models/{MODEL}/load", {"parameters": 5}, "parameters: must be an object, but is an integer"),
        (f"/v2/repository/models/{MODEL}/load", {"parameters": {"x": "y"}}, "parameters.x: is unknown; expected"),
        (f"/v2/repository/models/{MODEL}/load", {"parameters": {"config": {}}}, "parameters.config: must be a string"),
        (
            f"/v2/repository/models/{MODEL}/load",
            {"parameters": {"config": "{}", "file:1/m": "not base64!"}},
            "parameters.file:1/m: is not valid base64",
        ),
        (f"/v2/repository/models/{MODEL}/load", {"parameters": {"file:1/m": "AA=="}}, "needs 'config'"),
        (f"/v2/repository/models/{MODEL}/load", [1], "the request must be a JSON object"),
        (
            f"/v2/repository/models/{MODEL}/unload",
            {"parameters": {"unload_dependents": "yes"}},
            "parameters.unload_dependents: must be a boolean, but is a string",
        ),
        ("/v2/repository/index", {"ready": 1}, "ready: must be a boolean, but is an integer"),
    ],
)
async def test_wrong_repository_requests(door, path, document, text):
    await check(door, await door.http.post(path, json=document), 400, text)
    assert not door.control.calls


async def test_errors_of_the_model_and_faults_of_the_server(door):
    door.plane.failure = ModelExecutionError("the model failed: ValueError: bad row")
    response = await door.post_infer(GOOD)
    assert response.status_code == 500 and response.json() == {"error": "the model failed: ValueError: bad row"}
    door.plane.failure = RequestCancelled("taken back by the server")
    response = await door.post_infer(GOOD)
    assert response.status_code == 400 and response.json() == {"error": "taken back by the server"}
    door.plane.failure = KeyError("secret insides")
    response = await door.post_infer(GOOD)
    assert response.status_code == 500 and "secret" not in response.text and response.json()["error"]
    door.plane.failure = None
    door.control.failure = ZeroDivisionError("secret insides")
    response = await door.http.get("/v2/health/ready")
    assert response.status_code == 500 and "secret" not in response.text
    door.control.failure = InternalError("told on purpose")
    response = await door.http.get("/v2/health/ready")
    assert response.status_code == 500 and response.json() == {"error": "told on purpose"}
    assert (await door.post_infer(GOOD)).status_code == 200


async def test_readiness_has_statuses_and_no_body(door):
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        f"/v2/models/{MODEL}/ready",
        f"/v2/models/{MODEL}/versions/1/ready",
    ):
        response = await door.http.get(path)
        assert (response.status_code, response.content) == (200, b"")
    door.control.is_server_live = door.control.is_server_ready = False
    for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{MODEL}/ready", "/v2/models/nobody/ready"):
        response = await door.http.get(path)
        assert (response.status_code, response.content) == (400, b"")


async def test_index_of_ready_models_only(door):
    response = await door.http.post("/v2/repository/index", json={"ready": True})
    assert response.json() == [{"name": MODEL, "version": "1", "state": "READY"}]
    assert len((await door.http.post("/v2/repository/index")).json()) == 3
