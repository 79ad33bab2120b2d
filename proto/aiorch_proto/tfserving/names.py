"""The names of TensorFlow Serving's services and methods, without the messages, which are imported with ``service``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

#: The names of the methods by the name of their service, in the order of the .proto file.
METHOD_NAMES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "tensorflow.serving.PredictionService": (
            "Classify",
            "Regress",
            "Predict",
            "MultiInference",
            "GetModelMetadata",
        ),
        "tensorflow.serving.ModelService": ("GetModelStatus", "HandleReloadConfigRequest"),
    }
)
