"""Stateful models for the tests: a running sum whose state the server keeps, and that tells which signals it saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from running_site import TIMEOUT_S, Site

#: `value` that makes the model fail, wait until the file of parameter `gate` is there, or end its thread.
FAIL, WAIT, DIE = -1000, -2000, -3000

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
        rows = len(value) if value.ndim == 2 else 1
        ready = inputs["ready"].astype(bool).reshape(rows, 1)
        if (value == {FAIL}).any():
            raise ValueError("asked to fail")
        if (value == {DIE}).any():
            raise KeyboardInterrupt
        until = time.monotonic() + 20
        while (value == {WAIT}).any() and not self.gate.exists() and time.monotonic() < until:
            time.sleep(0.001)
        after = np.where(ready, before.reshape(rows, 1) + value.reshape(rows, 1), before.reshape(rows, 1))
        corrid = inputs["corrid"]
        if corrid.dtype == object:
            corrid = np.array([len(text) for text in corrid.reshape(-1)])
        columns = [inputs["start"], inputs["end"], inputs["ready"], corrid,
                   np.full((rows, 1), rows), np.arange(rows).reshape(rows, 1), np.full((rows, 1), self.instance)]
        signals = np.concatenate([column.reshape(rows, 1).astype(np.int64) for column in columns], axis=1)
        after, shape = after.reshape(value.shape), (rows, 7) if value.ndim == 2 else (7,)
        return {{"total": after, "signals": signals.reshape(shape), "sum_out": after}}
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


GROWING_MODEL = """
import numpy as np

class Model:
    def execute(self, inputs):
        text, before = inputs["text"], inputs["said_in"]
        after = np.concatenate([before, text], axis=1)
        joined = np.array([[b" ".join(row)] for row in after], dtype=object)
        return {"all": joined, "said_out": after}
"""

GROWING_CONFIG = """
backend: "python" max_batch_size: 4
input { name: "text" data_type: TYPE_STRING dims: [-1] }
output { name: "all" data_type: TYPE_STRING dims: [1] }
sequence_batching {
  {strategy}
  max_sequence_idle_microseconds: 20000000
  state { input_name: "said_in" output_name: "said_out" data_type: TYPE_STRING dims: [-1] }
}
"""


def write_growing(repository: Path, name: str, strategy: str) -> None:
    """A model whose state is a list of strings that grows; it begins with one empty string."""
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(GROWING_MODEL)
    (repository / name / "config.pbtxt").write_text(GROWING_CONFIG.replace("{strategy}", strategy))


def gate_of(repository: Path, name: str) -> Path:
    return repository.parent / f"{name}.gate"


def write_models(repository: Path) -> Path:
    """The repository of the contract tests: both strategies, correlation ids of each type, two instances."""
    repository.mkdir(exist_ok=True)
    direct = "direct { max_queue_delay_microseconds: 0 }"
    write_tally(repository, "oldest")
    write_tally(repository, "direct", strategy=direct)
    write_tally(repository, "oldest_two", instances="2", strategy="oldest { max_candidate_sequences: 3 }")
    write_tally(repository, "direct_two", instances="2", rows="3", strategy=direct)
    write_tally(repository, "direct_text", corrid="TYPE_STRING", strategy=direct)
    write_tally(repository, "oldest_text", corrid="TYPE_STRING")
    write_tally(repository, "oldest_int32", corrid="TYPE_INT32")
    write_tally(repository, "oldest_alone", rows="0")
    write_tally(repository, "direct_alone", rows="0", strategy=direct)
    write_tally(repository, "ordered", strategy="oldest { max_candidate_sequences: 4 preserve_ordering: true }")
    patient = "direct { max_queue_delay_microseconds: 60000000 minimum_slot_utilization: 0.75 }"
    write_tally(repository, "patient", strategy=patient)
    brief = "direct { max_queue_delay_microseconds: 50000 minimum_slot_utilization: 1 }"
    write_tally(repository, "brief", strategy=brief)
    initial = 'initial_state { data_type: TYPE_INT64 dims: [1] name: "seven" data_file: "seven" }'
    for strategy in ("oldest { max_candidate_sequences: 4 }", direct):
        name = f"initial_{strategy.partition(' ')[0]}"
        write_tally(repository, name, strategy=strategy, initial=initial)
        (repository / name / "initial_state").mkdir()
        (repository / name / "initial_state" / "seven").write_bytes((7).to_bytes(8, "little"))
        write_growing(repository, f"growing_{strategy.partition(' ')[0]}", strategy)
    return repository


class StatefulSite(Site):
    """A server over a repository of such models, on a thread of this process."""

    def __init__(self, repository: Path, **sections: Any) -> None:
        self.repository = repository
        backends = {"backends": ["aiorch_backends.python:PythonBackend"]}
        super().__init__(repository, io_threads=1, execution=backends, **sections)

    def servable(self, model: str) -> Any:
        (found,) = (each for each in self.application.manager.servables() if each.name == model)
        return found

    def count(self, model: str) -> dict[str, int]:
        """How many sequences there are, and how many of their requests wait."""
        table = self.table(model)
        return {"live": table.live, "backlog": table.backlog, "waiting": table.waiting_requests}

    def table(self, model: str) -> Any:
        return self.servable(model).sequencer._table

    def wait_count(self, model: str, **wanted: int) -> None:
        """Until the counts are these."""
        self.wait_for(lambda: wanted.items() <= self.count(model).items())

    def wait_for(self, is_true: Callable[[], bool]) -> None:
        """Polls with a deadline."""
        end = time.monotonic() + TIMEOUT_S
        while not is_true():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.002)

    @contextmanager
    def held(self, model: str) -> Iterator[Callable[[], None]]:
        """Requests with the value WAIT stay in the model until the block ends, or what it gives is called."""
        gate = gate_of(self.repository, model)
        gate.unlink(missing_ok=True)
        try:
            yield gate.touch
        finally:
            gate.touch()
