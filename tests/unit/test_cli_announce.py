import ast
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from aiorch_server.cli.announce import Announcer, ServedModel, write_examples, write_table
from aiorch_server.cli.output import Output
from aiorch_server.config.model import ModelConfig
from aiorch_server.types import ModelIndexEntry, ModelMetadata, ModelState, TensorMetadata

ADDRESSES = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}


@pytest.fixture(autouse=True)
def programs(monkeypatch, tmp_path):
    """An environment with both programs, on PATH."""
    folder = tmp_path / "own environment"
    folder.mkdir()
    for name in ("python", "aiorch"):
        (folder / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def served(name, *inputs, state=ModelState.READY):
    tensors = tuple(TensorMetadata(f"x{i}", datatype, shape) for i, (datatype, shape) in enumerate(inputs))
    metadata = ModelMetadata(name, ("1",), "", tensors, ()) if inputs else None
    return ServedModel(ModelIndexEntry(name, "1", state), metadata=metadata)


def test_the_model_with_the_least_input_is_shown():
    models = [
        served("broken", state=ModelState.UNAVAILABLE),
        served("big", ("FP32", (-1, 3, 9))),
        served("b", ("FP32", (-1, 2))),
    ]
    assert all(
        " b " in line or '"b"' in line or "/b/" in line for line in write_examples(ADDRESSES, models, has_tls=False)
    )
    assert write_examples(ADDRESSES, models[:1], has_tls=False) == []


def test_a_model_that_a_plain_request_does_not_fit_is_shown_last():
    tensor = {"data_type": "TYPE_FP32", "dims": [1]}
    signal = {"kind": "CONTROL_SEQUENCE_START", "fp32_false_true": [0, 1]}
    stateful = {"sequence_batching": {"control_input": [{"name": "start", "control": [signal]}]}}
    decoupled = {"model_transaction_policy": {"decoupled": True}}
    models = [served("big", ("FP32", (-1, 2)))]
    for name, more in (("stateful", stateful), ("decoupled", decoupled)):
        config = ModelConfig.from_dict({"backend": "python", "input": [{"name": "x0", **tensor}], **more})
        models.append(dataclasses.replace(served(name, ("FP32", (1,))), config=config))
    assert all("big" in line for line in write_examples(ADDRESSES, models, has_tls=False))
    python, curl, _ = write_examples(ADDRESSES, [models[1]], has_tls=False)
    assert "parameters=dict(sequence_id=1, sequence_start=True, sequence_end=True)" in python
    assert json.loads(shlex.split(curl)[-1])["parameters"]["sequence_end"] is True
    python, curl, _ = write_examples(ADDRESSES, [models[2]], has_tls=False)
    assert ".stream([c.InferRequest(" in python
    assert curl.endswith("/v2/models/decoupled")


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT64", "FP16", "FP32", "FP64", "BF16", "BYTES"])
def test_lines_are_valid_for_every_datatype(datatype):
    python, curl, bench = write_examples(ADDRESSES, [served("m", (datatype, (-1, 2)))], has_tls=False)
    code = shlex.split(python)[-1]
    ast.parse(code)
    array = code.partition('"x0": ')[2].rpartition("}")[0]
    assert eval(array, {"np": np}).shape == (1, 2)
    words = shlex.split(curl)
    if datatype in ("FP16", "BF16"):  # JSON cannot carry them
        assert words[-1] == "http://127.0.0.1:8000/v2/models/m"
    else:
        (tensor,) = json.loads(words[-1])["inputs"]
        assert (tensor["datatype"], tensor["shape"], len(tensor["data"])) == (datatype, [1, 2], 2)
    assert shlex.split(bench)[:3] == ["aiorch", "bench", "m"]


def test_doors_that_are_shut_are_not_advertised():
    model = [served("m", ("FP32", (-1, 2)))]
    assert [line.split()[0] for line in write_examples({"http": "h:1"}, model, has_tls=False)] == ["curl"]
    assert [line.split()[0] for line in write_examples({"grpc": "h:1"}, model, has_tls=False)] == ["python", "aiorch"]
    (bench,) = write_examples({"grpc": "h:1"}, model, has_tls=True)
    assert "--tls-root-cert" in bench


def test_long_inputs_are_not_written_out():
    lines = write_examples(ADDRESSES, [served("m", ("FP32", (-1, 2048)))], has_tls=False)
    assert all(len(line) < 200 for line in lines)


def test_programs_that_path_does_not_lead_to_are_named_in_full(programs, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "python").touch(0o755)
    monkeypatch.setenv("PATH", str(other))
    model = [served("m", ("FP32", (-1, 2)))]
    lines = write_examples({"grpc": "h:1"}, model, has_tls=False)
    assert [Path(shlex.split(line)[0]) for line in lines] == [programs / "python", programs / "aiorch"]
    (programs / "aiorch").unlink()  # the package is on the path, but was not installed
    assert write_examples({"grpc": "h:1"}, model, has_tls=False)[-1].startswith("aiorch ")


def test_names_are_never_cut_off(capsys):
    names = ["n" * 300 + end for end in "ab"]
    models = [served(name, ("FP32", (-1, 2)), state=ModelState.UNAVAILABLE) for name in names]
    Announcer(Output(is_json=False)).on_ready({}, models, has_tls=False)
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "UNAVAILABLE" in line]
    assert rows == names


def test_an_empty_repository_is_told_what_it_should_hold(capsys):
    Announcer(Output(is_json=False)).on_ready(ADDRESSES, [], has_tls=False)
    assert "my_model/1/model.onnx" in capsys.readouterr().out


def test_where_there_is_a_registry_the_way_into_it_is_told(capsys):
    Announcer(Output(is_json=False)).on_ready(ADDRESSES, [], has_tls=False, has_registry=True)
    assert "aiorch model push NAME FILE puts" in capsys.readouterr().out
    elsewhere = {"grpc": "127.0.0.1:9001"}
    Announcer(Output(is_json=False)).on_ready(elsewhere, [], has_tls=True, has_registry=True)
    assert "aiorch deploy NAME --url 127.0.0.1:9001 --tls-root-cert ROOT.pem serves" in capsys.readouterr().out


def test_columns_are_as_wide_as_they_must_be():
    rows = [
        {"name": "a", "version": "12", "state": "READY", "backend": "python", "max_batch_size": 8, "instances": 10},
        {"name": "a longer name", "version": "1", "state": "UNAVAILABLE"},
    ]
    assert write_table(rows).splitlines() == [
        "model          version  state        backend  batch  instances",
        "a              12       READY        python       8         10",
        "a longer name  1        UNAVAILABLE",
    ]


def test_people_at_a_terminal_are_told_the_same(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    models = [served("good", ("FP32", (-1, 2))), served("bad", state=ModelState.UNAVAILABLE)]
    told = []
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        announcer = Announcer(Output(is_json=False))
        announcer.begin()
        announcer.on_model(ModelIndexEntry("good", "1", ModelState.LOADING))
        capsys.readouterr()
        announcer.on_ready(ADDRESSES, models, has_tls=False)
        told.append(capsys.readouterr().out)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", told[1])
    assert told[0] in plain
    assert "\x1b[32m READY" in told[1] and "\x1b[31m UNAVAILABLE" in told[1]
