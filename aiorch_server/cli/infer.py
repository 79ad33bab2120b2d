"""``aiorch infer``: one inference from files."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from aiorch_client import Client, InferRequest, InferResult, RequestError
from rich.text import Text

from aiorch_server.cli.connection import (
    DEFAULT_URL,
    ClientOutput,
    HeaderOption,
    TimeoutSecs,
    TlsCert,
    TlsKey,
    TlsRoot,
    TokenFile,
    Url,
    UseTls,
    make_tls,
    open_client,
    read_headers,
    read_token,
)
from aiorch_server.cli.output import Json, UsageError
from aiorch_server.cli.tensors import read_inputs

Model = Annotated[str, typer.Argument(help="The model's name.")]
Input = Annotated[
    list[str],
    typer.Option(
        "--input",
        "-i",
        help="NAME=FILE, or FILE alone for a model with one input or a file that names its arrays; - is standard "
        "input. FILE is .npy, .npz or JSON.",
    ),
]
ModelVersion = Annotated[str, typer.Option("--model-version", help="A version; the server's choice if left out.")]


def infer(
    model: Model,
    inputs: Input,
    model_version: ModelVersion = "",
    output_name: Annotated[
        list[str] | None, typer.Option("--output-name", help="Ask for this output alone; repeatable.")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", help="KEY=VALUE for the request; repeatable.")
    ] = None,
    request_id: Annotated[str, typer.Option("--request-id", help="An id that the answer carries.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")] = None,
    url: Url = DEFAULT_URL,
    timeout_secs: TimeoutSecs = 60.0,
    tls: UseTls = False,
    tls_root_cert: TlsRoot = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    header: HeaderOption = None,
    json: Json = False,
) -> None:
    """Runs a model on tensors from files or standard input and shows what it gives, of a decoupled one in turn."""
    shown = ClientOutput(json)
    with shown.guard():
        if output is not None and output.suffix != ".npz":
            raise UsageError(f"--output {output}: expected a name that ends in .npz")
        tensors = read_inputs(inputs)
        parameters = _parse_parameters(parameter or [])
        tls_config = make_tls(tls, tls_root_cert, tls_cert, tls_key)
        request = InferRequest(model, tensors, model_version, output_name or None, parameters, request_id)
        with open_client(
            url, timeout_s=timeout_secs, tls=tls_config, token=read_token(token_file), metadata=read_headers(header)
        ) as client:
            for result in _ask(client, request, is_single=output is not None):
                if output is not None:
                    _save(result, output)
                written = [f"-> {output}"] if output else []
                shown.show(_describe(result, has_data=output is None), _render(result), *written)


def _ask(client: Client, request: InferRequest, *, is_single: bool) -> Iterator[InferResult]:
    """The answer, or those of a decoupled model as they come; UsageError for these where it must be one."""
    try:
        yield client.infer(
            request.model,
            request.inputs,
            version=request.version,
            outputs=request.outputs,
            parameters=request.parameters,
            request_id=request.request_id,
        )
        return
    except RequestError as error:
        if error.code.name != "UNIMPLEMENTED" or "decoupled" not in error.details:
            raise
    if is_single:
        raise UsageError(f"model '{request.model}' gives any number of answers, --output holds one; use --json")
    yield from client.stream([request])


def _parse_parameters(arguments: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value that is a number or boolean in JSON is one, anything else is text."""
    parameters: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or not key:
            raise UsageError(f"--parameter {argument}: expected KEY=VALUE")
        try:
            value = json_format.loads(text)
        except ValueError:
            value = text
        parameters[key] = value if isinstance(value, bool | int | float | str) else text
    return parameters


def _save(result: InferResult, path: Path) -> None:
    reserved = {"file", "allow_pickle"} & result.outputs.keys()
    if reserved:
        raise UsageError(f"output '{min(reserved)}' has a name that numpy cannot write to .npz; use --json")
    # Objects would be pickled; BYTES become numpy's own byte strings, which drop zero bytes at the end.
    arrays = {
        name: array if array.dtype != np.object_ else array.astype(np.bytes_) for name, array in result.outputs.items()
    }
    for name, array in result.outputs.items():
        if array.dtype == np.object_ and any(item.endswith(b"\0") for item in array.flat):
            raise UsageError(f"output '{name}' holds text that ends in zero bytes, which .npz cannot keep; use --json")
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}") from error


def _describe(result: InferResult, *, has_data: bool) -> dict[str, Any]:
    outputs = []
    for name, array in result.outputs.items():
        datatype = "bytes" if array.dtype == np.object_ else array.dtype.name
        described: dict[str, Any] = {"name": name, "dtype": datatype, "shape": list(array.shape)}
        outputs.append({**described, "data": array.tolist()} if has_data else described)
    return {
        "model_name": result.model_name,
        "model_version": result.model_version,
        "id": result.id,
        "parameters": dict(result.parameters),
        "outputs": outputs,
    }


def _render(result: InferResult) -> Text:
    text = Text(f"{result.model_name} version {result.model_version}")
    for name, array in result.outputs.items():
        datatype = "bytes" if array.dtype == np.object_ else array.dtype.name
        text.append(f"\n{name}", "bold").append(f" {datatype} {list(array.shape)}\n")
        text.append(np.array2string(array, threshold=200, edgeitems=4, max_line_width=110))
    return text
