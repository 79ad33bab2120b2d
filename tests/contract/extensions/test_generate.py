"""The generate extension: flat JSON in and out, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from running_site import TIMEOUT_S, Site

ROUTES = ["generate", "generate_stream"]


@pytest.fixture
def http(site: Site) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{site.http}", timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def read(response: httpx.Response, route: str) -> Any:
    """The one document of an answer."""
    if route == "generate" or response.status_code != 200:
        assert response.headers["content-type"] == "application/json"
        return response.json()
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    text = response.text
    assert text.startswith("data: ") and text.endswith("\n\n") and text.count("\n") == 2
    return json.loads(text.removeprefix("data: "))


@pytest.mark.proves("REST/generate*", by="HTTP")
def test_text_in_text_out(http: httpx.Client, route: str) -> None:
    document = {"id": "42", "INPUT0": "grün\n\ndata: x", "parameters": {"stream": False, "temperature": 0.5, "top": 3}}
    response = http.post(f"/v2/models/text/versions/1/{route}", json=document)
    assert response.status_code == 200
    assert read(response, route) == {
        "id": "42",
        "model_name": "text",
        "model_version": "1",
        "OUTPUT0": "grün\n\ndata: x",
    }


@pytest.mark.parametrize(
    ("model", "value", "answer"),
    [
        ("text", ["a", "b"], ["a", "b"]),
        ("text", [], []),
        ("identity", 1.5, 1.5),
        ("identity", [1.5, 2, 3], [1.5, 2.0, 3.0]),  # [-1,-1]: the batch is 1
        ("scores_INT64", [2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
        ("scores_BOOL", True, True),
        ("column", [1, 2, 3], [1, 2, 3]),  # [-1,1]: one row each
    ],
)
def test_values_get_the_shape_of_the_model(http: httpx.Client, route: str, model: str, value: Any, answer: Any) -> None:
    response = http.post(f"/v2/models/{model}/{route}", json={"INPUT0": value})
    assert response.status_code == 200, response.text
    assert read(response, route)["OUTPUT0"] == answer
    nested = http.post(f"/v2/models/{model}/{route}", json={"parameters": {"INPUT0": value}})
    assert read(nested, route) == read(response, route)


@pytest.mark.parametrize(
    ("model", "document", "status", "text"),
    [
        ("nobody", {}, 400, "Request for unknown model: 'nobody' is not found"),
        ("text/versions/9", {}, 404, "version 9 is not found"),
        ("text", [], 400, "must be a JSON object"),
        ("text", {"INPUT0": 1}, 400, "INPUT0: element 0 is an integer, which is not BYTES"),
        ("text", {"INPUT0": None}, 400, "INPUT0: element 0 is null, which is not BYTES"),
        ("text", {"INPUT0": {"a": 1}}, 400, "INPUT0: element 0 is an object"),
        (
            "text",
            {"INPUT0": "a", "extra": [1]},
            400,
            "extra: must be a boolean, number or string, because it is no input",
        ),
        ("text", {"INPUT0": "a", "parameters": 3}, 400, "Expected JSON object for keyword: 'parameters'"),
        ("text", {"INPUT0": "a", "parameters": {"INPUT0": "b"}}, 400, "'INPUT0' is given twice"),
        ("text", {"INPUT0": "a", "id": 7}, 400, "id: must be a string, but is an integer"),
        ("text", {"INPUT0": "a", "triton_x": 7}, 400, "parameter 'triton_x' is refused"),
        ("text", {"INPUT0": "\ud800"}, 400, "half a surrogate pair"),
        ("text", {"INPUT0": "a", "\ud800": 1}, 400, "half a surrogate pair"),
        ("text", {"INPUT0": "a", "x": "\ud800"}, 400, "half a surrogate pair"),
        ("text", {}, 400, "missing required input(s) ['INPUT0']"),
        ("text", {f"p{n}": n for n in range(1025)}, 413, "has 1025 members, expected at most 1024"),
        ("scores_FP16", {"INPUT0": 1.0}, 400, "receiving FP16 data via JSON is not supported"),
        ("column", {"INPUT0": list(range(9))}, 400, "inference request batch-size must be <= 8 for 'column'"),
        ("pairs", {"INPUT0": [1, 2, 3]}, 400, "The schema can not convert input 'INPUT0' to tensor with proper shape"),
    ],
)
def test_requests_that_are_refused(
    http: httpx.Client, route: str, model: str, document: Any, status: int, text: str
) -> None:
    """With a status, and as plain JSON on both routes: nothing was answered yet."""
    response = http.post(f"/v2/models/{model}/{route}", content=json.dumps(document))
    assert response.status_code == status, response.text
    assert text in read(response, route)["error"]


def test_answers_that_json_cannot_hold(http: httpx.Client, route: str) -> None:
    response = http.post(f"/v2/models/to_half/{route}", json={"INPUT0": 1})
    assert response.status_code == 400
    assert "sending FP16 data via JSON is not supported" in read(response, route)["error"]


@pytest.mark.proves("REST/generate_stream", by="HTTP")
def test_many_answers_are_many_events(http: httpx.Client) -> None:
    """An error among them is an event like others; the end without an answer is none."""
    with http.stream("POST", "/v2/models/repeat/generate_stream", json={"id": "r", "INPUT0": [3, 13, 5]}) as response:
        assert response.status_code == 200
        events = response.read().decode().removesuffix("\n\n").split("\n\n")
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [each.get("OUTPUT0", each.get("error")) for each in found] == [3, "thirteen", 5]
    assert found[0] == {"id": "r", "model_name": "repeat", "model_version": "1", "OUTPUT0": 3}
    response = http.post("/v2/models/repeat/generate_stream", json={"INPUT0": []})
    assert (response.status_code, response.text) == (200, "")


@pytest.mark.parametrize(
    ("values", "status", "text"),
    [([7], 200, ""), ([7, 8], 501, "exactly 1 response"), ([], 501, "exactly 1 response"), ([13], 500, "thirteen")],
)
def test_generate_wants_one_answer(http: httpx.Client, values: Any, status: int, text: str) -> None:
    response = http.post("/v2/models/repeat/generate", json={"INPUT0": values})
    assert response.status_code == status, response.text
    assert text in response.text and ("OUTPUT0" in response.json()) is (status == 200)


async def test_a_client_that_leaves_takes_its_request_along(site: Site, route: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{site.http}") as client:
        waiting = asyncio.create_task(client.post(f"/v2/models/gate/{route}", json={"INPUT0": 1.0}))
        await wait_pending(site, 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await wait_pending(site, 0)


async def test_a_client_that_leaves_ends_a_stream_of_which_more_is_always_there(site: Site) -> None:
    """Else all of it would be made, and read, for nobody, and the model would be of use to nobody else."""
    async with httpx.AsyncClient(base_url=f"http://{site.http}", timeout=TIMEOUT_S) as client:
        path, values = "/v2/models/repeat/generate_stream", [7] * 200_000
        async with client.stream("POST", path, json={"INPUT0": values}) as response:
            await anext(response.aiter_bytes())
        async with asyncio.timeout(TIMEOUT_S / 4):
            assert "7" in (await client.post(path, json={"INPUT0": [7]})).text


async def wait_pending(site: Site, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while site.count_pending() != count:
            await asyncio.sleep(0.002)
