"""A policy that was learnt: a network of one hidden layer, and the file that it comes in. Needs numpy alone.

``train`` made the file ``learned.json`` beside this one; it says with which command, and how good it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aiorch_server.environment.knobs import NAMES, SHAPE

FILE: Final = Path(__file__).with_name("learned.json")
HIDDEN: Final = 8
_INPUTS: Final = len(NAMES) + 1
_OUTPUTS: Final = len(SHAPE)
#: Numbers of a network.
SIZE: Final = HIDDEN * _INPUTS + _OUTPUTS * (HIDDEN + 1)


@dataclass(frozen=True, slots=True)
class Network:
    """SIZE ``weights``, the hidden layer's first. Each output is a part of its knob's range, rows as octaves."""

    weights: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.weights.shape != (SIZE,) or not np.isfinite(self.weights).all():
            raise ValueError(f"a network has {SIZE} weights, found {self.weights.shape}")

    def act(self, observation: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """The action for what is seen."""
        inner = self.weights[: HIDDEN * _INPUTS].reshape(HIDDEN, _INPUTS)
        outer = self.weights[HIDDEN * _INPUTS :].reshape(_OUTPUTS, HIDDEN + 1)
        hidden = np.tanh(inner @ np.append(observation.astype(np.float64), 1.0))
        parts = 0.5 + 0.5 * np.tanh(outer @ np.append(hidden, 1.0))
        rows = SHAPE[0] ** parts[0] - 1.0
        # delays are mostly short: the square leaves room for that
        others = (parts[1] ** 2 * (SHAPE[1] - 1), parts[2] * (SHAPE[2] - 1), parts[3])
        action: npt.NDArray[np.int64] = np.rint(np.array([rows, *others])).astype(np.int64)
        return action


def read_network(path: Path = FILE) -> Network:
    """ValueError where the file has none of this observation and these knobs."""
    told = json.loads(path.read_text())
    if told.get("observation") != list(NAMES) or told.get("actions") != list(SHAPE):
        raise ValueError(f"{path} was trained for other observations or knobs: train it anew")
    return Network(np.array(told["weights"], np.float64))


def write_network(path: Path, network: Network, facts: dict[str, Any]) -> None:
    """With what it was made for, and how: seed, command, score."""
    weights = [round(each, 4) for each in network.weights.tolist()]
    told = {**facts, "observation": list(NAMES), "actions": list(SHAPE), "weights": weights}
    path.write_text(json.dumps(told, indent=1) + "\n")
