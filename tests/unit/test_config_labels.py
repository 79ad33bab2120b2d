"""Labels of versions in the parameters of a model's configuration."""

from __future__ import annotations

import pytest

from aiorch_server.config.labels import read_labels
from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError


def test_labels_are_parameters() -> None:
    parameters = {"version_label.stable": 3, "version_label.canary": "4", "cpu_threads": "1"}
    config = ModelConfig.from_dict({"parameters": parameters}, folder="m")
    assert read_labels(config.to_strings()) == {"stable": 3, "canary": 4}
    assert ModelConfig.from_dict(config.to_dict(), folder="m") == config


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("version_label.", "1", "it must not be empty nor hold '/' or ':'"),
        ("version_label.a/b", "1", "it must not be empty nor hold '/' or ':'"),
        ("version_label.a:b", "1", "it must not be empty nor hold '/' or ':'"),
        *(
            ("version_label.stable", text, "it must be a version, 1 or more")
            for text in ("", "0", "-1", "1.5", "latest", "²", "1" * 19)
        ),
    ],
)
def test_wrong_labels(name: str, value: str, problem: str) -> None:
    with pytest.raises(ModelLoadError, match="parameters") as raised:
        ModelConfig.from_dict({"parameters": {name: value}}, folder="m")
    assert problem in str(raised.value)
