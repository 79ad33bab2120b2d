"""Large arrays of numbers are read in pieces, with the answers and errors of reading the document as a whole."""

import json
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server.errors import RequestError
from aiorch_server.frontends.rest import infer_json, number_text
from aiorch_server.frontends.rest.infer_json import parse_infer
from aiorch_server.types import DataType

PIECE_BYTES = 48
LIMIT = 1 << 24


def write(data: str, shape: str = "[4]", datatype: str = "FP32", more: str = "") -> str:
    return f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]{more}}}'


def read(body: bytes) -> Any:
    try:
        call = parse_infer(body, None, "m", "", LIMIT)
    except RequestError as error:
        return str(error)
    return [(tensor.name, tensor.shape, bytes(tensor.data)) for tensor in call.request.inputs], call.request.parameters


def read_both(monkeypatch: pytest.MonkeyPatch, body: bytes) -> tuple[Any, Any, int]:
    """In pieces and as a whole, and how often the first way had to parse the document."""
    parsed = []
    whole = infer_json.parse_document
    with monkeypatch.context() as patch:
        patch.setattr(infer_json, "parse_document", lambda *arguments: (parsed.append(1), whole(*arguments))[1])
        patch.setattr(infer_json, "PIECE_BYTES", PIECE_BYTES)
        patch.setattr(number_text, "PIECE_BYTES", PIECE_BYTES)
        apart = read(body)
    return apart, read(body), len(parsed)


def nest(values: list[Any], *sizes: int) -> Any:
    for size in reversed(sizes):
        values = [values[start : start + size] for start in range(0, len(values), size)]
    return values


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n\t", " :\r\n")])
@pytest.mark.parametrize("sizes", [(), (2,), (7,), (1, 60), (2, 3, 5), (60, 1, 1)])
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT64", "UINT8"])
def test_plain_arrays_are_read_in_pieces(monkeypatch, separators, sizes, datatype) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, 60).tolist() if "INT" in datatype else rng.standard_normal(60).tolist()
    item = {"name": "x", "datatype": datatype, "shape": [60], "data": nest(values, *sizes)}
    other = {"name": "other", "datatype": datatype, "shape": [60], "data": values}
    body = json.dumps({"parameters": {"a": 1}, "inputs": [item, other]}, separators=separators).encode()
    apart, whole, parsed = read_both(monkeypatch, body)
    assert apart == whole and not isinstance(whole, str)
    assert parsed == 1


LONG = ",".join(["1.5"] * 40)


@pytest.mark.parametrize(
    "text",
    [
        write(f"[{LONG}]", "[41]"),
        write(f"[{LONG},]", "[40]"),
        write(f"[{LONG}", "[40]"),
        write(f"[{LONG}]]", "[40]"),
        write(f"[[{LONG}]", "[40]"),
        write(f"[{LONG},[{LONG}]]", "[80]"),
        write(f"[[{LONG}],{LONG}]", "[80]"),
        write(f"[[{LONG}],[[{LONG}]]]", "[80]"),
        write(f"[[{LONG}][{LONG}]]", "[80]"),
        write(f"[[{LONG}],[],[{LONG}]]", "[80]"),
        write(f"[{LONG},1 2,{LONG}]", "[82]"),
        write(f"[{LONG},1e400,{LONG}]", "[81]"),
        write(f"[{LONG},1e39,{LONG}]", "[81]"),
        write(f"[{LONG},01,{LONG}]", "[81]"),
        write(f"[{LONG},.5,{LONG}]", "[81]"),
        write(f"[{LONG}]", "[40]", "INT32"),
        write(f"[{LONG}]", "[40]", "BOOL"),
        write(f"[{LONG}]", "[40]", "BYTES"),
        write(f'"[{LONG}]"', "[40]"),
        write(f'["[{LONG}]"]', "[1]", "BYTES"),
        write("[1.0]", "[1]", more=f',"id":"[{LONG}]"'),
        write("[1.0]", "[1]", more=f',"unknown":[{LONG}]'),
        write("[1.0]", "[1]", more=f',"parameters":{{"a":[{LONG}]}}'),
        write(f'[{LONG}],"data":[1,2]', "[2]"),
        write(f'[1,2],"data":[{LONG}]', "[40]"),
        write(f"[{LONG}]", f"[{LONG}]"),
        f"[{LONG}]",
        f"{LONG}",
        f'"\\"[{LONG}]"',
        " " * 100 + write(f"[{' ' * 600}{LONG}]", "[40]") + " " * 100,
    ],
)
def test_anything_else_has_the_same_answer(monkeypatch, text) -> None:
    apart, whole, _ = read_both(monkeypatch, text.encode())
    assert apart == whole


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 400),
    st.text('[]0123456789.,-+eE \n"{}:', max_size=4),
    st.integers(0, 6),
    st.sampled_from([(), (5,), (2, 5)]),
)
def test_broken_arrays_have_the_same_answer(at, inserted, cut, sizes) -> None:
    text = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [40], "data": nest([0.25] * 40, *sizes)}]})
    body = (text[:at] + inserted + text[at + cut :]).encode()
    with pytest.MonkeyPatch.context() as monkeypatch:
        apart, whole, _ = read_both(monkeypatch, body)
    assert apart == whole


@pytest.mark.parametrize("sizes", [(), (1000,), (50, 2)])
def test_no_step_is_long(monkeypatch, sizes) -> None:
    """What msgspec is given at once is what it holds the interpreter lock for."""
    steps = []
    decode = msgspec.json.decode
    monkeypatch.setattr(msgspec.json, "decode", lambda text: (steps.append(len(text)), decode(text))[1])
    values = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    body = write(json.dumps(nest(values.tolist(), *sizes)), "[100000]").encode()
    call = parse_infer(body, None, "m", "", LIMIT)
    assert call.request.inputs[0].data == values.tobytes()
    assert len(body) > 1_500_000 and max(steps) <= number_text.PIECE_BYTES + 2


@pytest.mark.parametrize("run", ["]" * 60_000, "] " * 30_000, "]" + " " * 60_000, "]," + " " * 60_000, "]" * 60 + ",["])
def test_brackets_without_end_cost_little(run) -> None:
    text = number_text.NumberText(memoryview(f"[1{run}2,3]".encode()))
    started_s = time.process_time()
    with pytest.raises(number_text.NotPlain):
        text.pack(DataType.FP32, 3, "x", "inputs[0].data")
    assert time.process_time() - started_s < 1.0
