"""What ``aiorch serve`` tells: models as they load, then what serves where, with lines to paste."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiorch_server.cli.output import STATE_STYLES, Output, write_reasons
from aiorch_server.config.model import ModelConfig
from aiorch_server.types import ModelIndexEntry, ModelMetadata, ModelState, TensorMetadata

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.status import Status

#: The columns of the final table: what a row has, and how it is called there.
_COLUMNS = {
    "name": "model",
    "version": "version",
    "state": "state",
    "backend": "backend",
    "max_batch_size": "batch",
    "instances": "instances",
}
_NUMBERS = ("max_batch_size", "instances")
#: The largest tensor that a line to paste writes out.
_MAX_PASTED = 64
_NO_MODELS = "no models: a repository holds a folder per model with a folder per version, as in my_model/1/model.onnx"
_NOTHING_DEPLOYED = "no models: {} model push NAME FILE{} puts one into the registry, {} deploy NAME{} serves it"
#: What makes a request a sequence of its own: first and last.
_PLACE = {"sequence_id": 1, "sequence_start": True, "sequence_end": True}
#: Where commands look for a server unless they are told.
_DEFAULT_ADDRESS = "127.0.0.1:8001"
_DTYPES = {"FP16": "float16", "BF16": "float32", "FP32": "float32", "FP64": "float64", "BOOL": "bool"}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A row of the final table; ``config`` and ``metadata`` are there for models that are ready."""

    entry: ModelIndexEntry
    config: ModelConfig | None = None
    metadata: ModelMetadata | None = None

    @property
    def is_stateful(self) -> bool:
        """Whether requests must belong to a sequence."""
        return self.config is not None and self.config.sequence_batching is not None

    @property
    def is_decoupled(self) -> bool:
        """Whether requests must come over a stream."""
        policy = None if self.config is None else self.config.model_transaction_policy
        return policy is not None and policy.decoupled

    def describe(self) -> dict[str, Any]:
        """The row as plain values."""
        described: dict[str, Any] = {
            "name": self.entry.name,
            "version": self.entry.version,
            "state": self.entry.state.value,
            "reason": self.entry.reason,
        }
        if self.config is not None:
            described["backend"] = self.config.backend
            described["max_batch_size"] = self.config.max_batch_size or 0
            described["instances"] = sum(group.count for group in self.config.instance_group)
        return described


class Announcer:
    """Shows the start and the end of a server; for the event loop's thread."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._loading: dict[str, None] = {}
        self._done = 0
        # A spinner is for terminals; elsewhere each model gets a line.
        self._status: Status | None = None
        if not output.is_json and output.is_terminal:
            self._status = output.console.status("loading models")

    def begin(self) -> None:
        """The models start to load."""
        if self._status is not None:
            self._status.start()

    def end(self) -> None:
        """Nothing loads any more; may be called twice."""
        if self._status is not None:
            self._status.stop()

    def on_model(self, entry: ModelIndexEntry) -> None:
        """A model version has a new state."""
        name = f"{entry.name} {entry.version}".strip()
        if entry.state is ModelState.LOADING:
            self._loading[name] = None
        elif self._loading.pop(name, self) is not self:
            self._done += 1
        event = {"event": "model", "name": entry.name, "version": entry.version, "state": entry.state.value}
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(f"{self._done} done, loading {', '.join(self._loading) or 'models'}"))
        else:
            # A line says only what happened: why stands in the log.
            self._output.show({**event, "reason": entry.reason}, f"{entry.state.value.lower()} {name}")

    def on_ready(
        self, addresses: Mapping[str, str], models: Sequence[ServedModel], *, has_tls: bool, has_registry: bool = False
    ) -> None:
        """The server takes requests at ``addresses`` (by door: grpc, http, metrics)."""
        self.end()
        rows = [model.describe() for model in models]
        document = {"event": "ready", "addresses": dict(addresses), "models": rows}
        where = "\nserving: " + "  ".join(f"{door} {address}" for door, address in addresses.items()) + "\n"
        examples = write_examples(addresses, models, has_tls=has_tls)
        table = (
            self._paint(write_table(rows))
            if rows
            else _write_nothing_deployed(addresses, has_tls)
            if has_registry
            else _NO_MODELS
        )
        # Whoever sits at the terminal has seen the log scroll by; elsewhere each reason stands in it once.
        reasons = [] if self._status is None else write_reasons(rows)
        self._output.show(document, table, *reasons, where, *examples)

    def _paint(self, table: str) -> RenderableType:
        """The table with its header and states marked for people at a terminal."""
        if self._status is None:
            return table
        from rich.text import Text

        painted = Text(table)
        painted.stylize("bold", 0, table.index("\n"))
        for state, style in STATE_STYLES.items():
            painted.highlight_words([f" {state}"], style)
        return painted

    def on_stop(self) -> None:
        """The server has answered what was under way and gone."""
        self.end()
        self._output.show({"event": "stopped"}, "stopped")


def _write_nothing_deployed(addresses: Mapping[str, str], has_tls: bool) -> str:
    address = addresses.get("grpc", _DEFAULT_ADDRESS)
    way = "" if address == _DEFAULT_ADDRESS else f" --url {address}"
    way += " --tls-root-cert ROOT.pem" if has_tls else ""
    program = _name_program("aiorch")
    return _NOTHING_DEPLOYED.format(program, way, program, way)


def write_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each row below a header, in columns as wide as they must be; numbers stand to the right."""
    cells = [list(_COLUMNS.values()), *([str(row.get(key, "")) for key in _COLUMNS] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    aligned = [
        [
            cell.rjust(width) if key in _NUMBERS else cell.ljust(width)
            for key, cell, width in zip(_COLUMNS, line, widths, strict=True)
        ]
        for line in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def write_examples(addresses: Mapping[str, str], models: Sequence[ServedModel], *, has_tls: bool) -> list[str]:
    """Lines to paste into a shell: a call in Python, one with curl, a load test; for the model with the least input.

    A model that a plain request does not fit, because it keeps state or is decoupled, is shown where there is no other.
    """
    ready = [(model, model.metadata) for model in models if model.metadata is not None]
    if not ready:
        return []
    model, metadata = min(
        ready,
        key=lambda each: (each[0].is_stateful or each[0].is_decoupled, sum(map(_count, each[1].inputs))),
    )
    name = model.entry.name
    lines = []
    grpc_address, http_address = addresses.get("grpc"), addresses.get("http")
    if grpc_address is not None and not has_tls:
        arrays = ", ".join(f'"{tensor.name}": {_write_array(tensor)}' for tensor in metadata.inputs)
        flags = ", ".join(f"{key}={value}" for key, value in _PLACE.items())  # no quotes: the shell's are around
        place = f", parameters=dict({flags})" if model.is_stateful else ""
        call = f'c.Client("{grpc_address}").infer("{name}", {{{arrays}}}{place}).outputs'
        if model.is_decoupled:
            call = f'*(r.outputs for r in c.Client("{grpc_address}").stream([c.InferRequest("{name}", {{{arrays}}})]))'
        lines.append(f"{_name_program('python')} -c 'import numpy as np, aiorch_client as c; print({call})'")
    if http_address is not None:
        url = f"http://{http_address}/v2/models/{name}"
        body = "" if model.is_decoupled else _write_body(metadata, _PLACE if model.is_stateful else {})
        lines.append(f"curl -s {url}/infer -d '{body}'" if body else f"curl -s {url}")
    if grpc_address is not None:
        tls = " --tls-root-cert ROOT.pem" if has_tls else ""
        lines.append(f"{_name_program('aiorch')} bench {name} --url {grpc_address} --concurrency 16 --duration 5{tls}")
    return lines


def _name_program(name: str) -> str:
    """What a shell is told to run ``name`` of this environment: its path where PATH does not lead to it."""
    program = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not program.is_file() or (found is not None and Path(found).parent == program.parent):
        return name
    return shlex.quote(str(program))


def _count(tensor: TensorMetadata) -> int:
    return math.prod(_fill(tensor))


def _fill(tensor: TensorMetadata) -> list[int]:
    return [1 if size == -1 else size for size in tensor.shape]


def _write_array(tensor: TensorMetadata) -> str:
    shape = tuple(_fill(tensor))
    if tensor.datatype == "BYTES":
        return f'np.full({shape}, "text", object)'
    return f"np.zeros({shape}, np.{_DTYPES.get(tensor.datatype, tensor.datatype.lower())})"


def _write_body(metadata: ModelMetadata, parameters: Mapping[str, Any]) -> str:
    """The JSON of a REST request with zeros; empty where it would be long or JSON cannot carry the type."""
    tensors = []
    for tensor in metadata.inputs:
        count = _count(tensor)
        if count > _MAX_PASTED or tensor.datatype in ("FP16", "BF16"):
            return ""
        value: Any = {"BYTES": "text", "BOOL": False}.get(tensor.datatype, 0)
        shape = {"name": tensor.name, "shape": _fill(tensor), "datatype": tensor.datatype}
        tensors.append({**shape, "data": [value] * count})
    body = {"parameters": parameters, "inputs": tensors} if parameters else {"inputs": tensors}
    return json.dumps(body, separators=(",", ":"))
