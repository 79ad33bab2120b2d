"""Stateful models for the tests: a running sum whose state the server keeps, and that tells which signals it saw."""

from __future__ import annotations

from pathlib import Path

#: `value` that make the model fail, and wait until the file of parameter `gate` is there.
FAIL, WAIT = -1000, -2000

MODEL = f"""
import time
from pathlib import Path
import numpy as np

class Model:
    def load(self, context):
        self.gate = Path(context.parameters.get("gate", "/nowhere"))
        self.instance = context.instance_index

    def execute(self, inputs):
        value, before = inputs["value"], inputs["sum_in"]
        rows = len(value)
        ready = inputs["ready"].astype(bool).reshape(rows, 1)
        if (value == {FAIL}).any():
            raise ValueError("asked to fail")
        until = time.monotonic() + 20
        while (value == {WAIT}).any() and not self.gate.exists() and time.monotonic() < until:
            time.sleep(0.001)
        after = np.where(ready, before + value, before)
        columns = [inputs["start"], inputs["end"], inputs["ready"], inputs["corrid"],
                   np.full((rows, 1), rows), np.arange(rows).reshape(rows, 1), np.full((rows, 1), self.instance)]
        signals = np.concatenate([column.reshape(rows, 1).astype(np.int64) for column in columns], axis=1)
        return {{"total": after, "signals": signals, "sum_out": after}}
"""

#: What `signals` holds, by column.
SIGNALS = ("start", "end", "ready", "corrid", "rows", "row", "instance")

CONFIG = """
backend: "python" max_batch_size: {rows}
input { name: "value" data_type: TYPE_INT64 dims: [1] }
output [{ name: "total" data_type: TYPE_INT64 dims: [1] }, { name: "signals" data_type: TYPE_INT64 dims: [7] }]
instance_group { count: {instances} kind: KIND_CPU }
parameters { key: "gate" value { string_value: "{gate}" } }
sequence_batching {
  {strategy}
  max_sequence_idle_microseconds: {idle_us}
  control_input [
    { name: "start" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } },
    { name: "end" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [0, 1] } },
    { name: "ready" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [false, true] } },
    { name: "corrid" control { kind: CONTROL_SEQUENCE_CORRID data_type: {corrid} } }
  ]
  state { input_name: "sum_in" output_name: "sum_out" data_type: TYPE_INT64 dims: [1] {initial} }
}
"""

DEFAULTS = {
    "rows": "4",
    "instances": "1",
    "idle_us": "20000000",
    "corrid": "TYPE_UINT64",
    "initial": "",
    "strategy": "oldest { max_candidate_sequences: 4 }",
}


def write_tally(repository: Path, name: str, **fields: str) -> None:
    """One such model; its gate is the file ``<name>.gate`` beside the repository's folder."""
    config = CONFIG
    for key, value in {**DEFAULTS, "gate": str(gate_of(repository, name)), **fields}.items():
        config = config.replace("{" + key + "}", value)
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(MODEL)
    (repository / name / "config.pbtxt").write_text(config)


def gate_of(repository: Path, name: str) -> Path:
    return repository.parent / f"{name}.gate"


def write_models(repository: Path) -> None:
    """The repository of the contract tests."""
    repository.mkdir(exist_ok=True)
    write_tally(repository, "oldest")
