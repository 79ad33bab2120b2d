"""The values that are asked for are written nowhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from running_site import encode_values
from served import serve

from aiorch_server.frontends.grpc import FAST_PATH
from aiorch_server.frontends.grpc.restricted import GROUPS

from .conftest import (
    BODY,
    OPERATIONS,
    ask,
    fetch,
)

HIDDEN = ("Xyzzy-1-grpc", "Xyzzy-2-http", "Xyzzy-3-sent")


def test_the_value_is_in_no_log(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value comes on the command line, one in the environment, one is sent by a client that has it wrong."""
    monkeypatch.setenv("AIORCH_HTTP_RESTRICTED_API", f"health,metadata:k1={HIDDEN[1]}\ninference:k2={HIDDEN[1]}")
    rule = f"inference,metadata,health,logging:k={HIDDEN[0]}"
    options = ("--log-verbose", "1", "--log-slow-us", "1", "--grpc-restricted-protocol", rule)
    with serve(models, *options) as running:
        site: Any = running
        with grpc.insecure_channel(running.grpc) as channel:
            for path in GROUPS:
                for value in (HIDDEN[0], HIDDEN[2]):
                    ask(channel, path, (("triton-grpc-protocol-k", value), ("aiorch-timing", "1")), b"\xff")
            message = encode_values([1.0])
            assert ask(channel, FAST_PATH, (("triton-grpc-protocol-k", HIDDEN[0]),), message) == ("OK", "")
            assert ask(channel, FAST_PATH, message=message)[0] == "UNAVAILABLE"
        for name, value in itertools.product(("k1", "k2"), HIDDEN[1:]):
            for method, path in OPERATIONS:
                assert b"Xyzzy" not in fetch(site, method, path, ((name, value),), BODY)[1]
        assert fetch(site, "POST", "/v2/models/identity/infer", (("k2", HIDDEN[1]),), BODY)[0] == 200
        assert fetch(site, "POST", "/v2/models/identity/infer", (("k1", HIDDEN[1]),), BODY)[0] == 403
        assert running.end() == 0
        written = running.log.read_text() + json.dumps(running.ready)
        assert "slow" in written or "debug" in written.lower()
        assert "Xyzzy" not in written and "Traceback" not in written
