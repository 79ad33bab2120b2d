"""How JSON is read: the fast reader takes nothing and refuses nothing that the standard library's would not."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server.errors import RequestError
from aiorch_server.frontends.rest import infer
from aiorch_server.frontends.rest.infer_json import measure_json, parse_document

ODD = [
    *(b"18446744073709551616", b"-9223372036854775809", b"-0", b"-0.0", b"1e400", b"-1e400", b"1e-400", b"NaN"),
    *(b"Infinity", b"-Infinity", b"01", b"+1", b"1.", b".5", b"1e", b"-", b"0x10", b"1_0", b"9" * 5000, b"tru"),
    *(b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\xed\xa0\x80"', b'"\xff"', b'"\xc0\x80"', b'"\x01"', b'"\\x41"'),
    *(b"[1,]", b'{"a":1,}', b'{"a":1,"a":2}', b"[" * 100_000, b"", b"// no", b"1 2", b"'a'", b"nul", b"1\x00"),
]


def read_reference(text: bytes) -> object:
    try:
        return json.loads(str(text, "utf-8"))
    except (ValueError, RecursionError):
        return RequestError


def read(text: bytes) -> object:
    try:
        return parse_document(text, 1 << 20)
    except RequestError:
        return RequestError


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd[:20]))
def test_odd_values_are_read_as_by_the_standard_library(odd: bytes) -> None:
    text = b'{"a": ' + odd + b"}"
    expected = read_reference(text)
    found = read(text)
    assert repr(found) == repr(expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats() | st.integers() | st.text() | st.booleans() | st.none()))
def test_documents_are_read_as_by_the_standard_library(values: list[object]) -> None:
    text = json.dumps({"a": values}).encode()
    assert repr(read(text)) == repr(read_reference(text))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=20))
def test_bytes_are_read_as_by_the_standard_library(inside: bytes) -> None:
    text = b'{"a":[' + inside + b"]}"
    assert repr(read(text)) == repr(read_reference(text))


@pytest.mark.parametrize(
    ("header", "size"), [(None, 100), ("40", 40), ("400", 100), ("x", 100), ("9" * 30, 100), ("²", 100)]
)
def test_json_is_measured_by_the_header(header: str | None, size: int) -> None:
    assert measure_json(b"x" * 100, header) == size


async def test_much_json_is_read_on_a_thread(door, monkeypatch) -> None:
    apart = []
    to_thread = asyncio.to_thread

    async def record(function, *arguments):
        apart.append(function.__name__)
        return await to_thread(function, *arguments)

    monkeypatch.setattr(infer.asyncio, "to_thread", record)
    for count, names in ((100, []), (13_000, ["parse_infer"])):
        values = np.random.default_rng(0).standard_normal(count).astype(np.float32)
        document = {"name": "x", "datatype": "FP32", "shape": [count], "data": values.tolist()}
        outputs = [{"name": "x", "parameters": {"binary_data": True}}]
        answer = await door.post_infer({"inputs": [document], "outputs": outputs})
        assert answer.status_code == 200, answer.text
        assert answer.content[int(answer.headers["inference-header-content-length"]) :] == values.tobytes()
        assert apart == names
