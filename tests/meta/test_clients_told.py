"""docs/clients.md says which test shows what of which client, and leaves nothing out that somebody relies on."""

from __future__ import annotations

import runpy
from pathlib import Path

from aiorch_proto.v2.service import METHODS

DOCS = Path(__file__).parents[2] / "docs"
#: Every call that these have is shown.
COMPLETE = ("tritonclient.grpc", "tritonclient.grpc.aio", "tritonclient.http", "tritonclient.http.aio")


def test_the_table_is_that_of_the_tests() -> None:
    written = runpy.run_path(str(DOCS / "write_clients.py"))
    page = (DOCS / "clients.md").read_text()
    assert page == written["render"](page), "run docs/write_clients.py"


def test_nothing_is_left_out() -> None:
    written = runpy.run_path(str(DOCS / "write_clients.py"))
    calls, found = written["CALLS"], written["collect"]()
    assert {call.partition("/")[2] for call in calls if call.startswith("GRPCInferenceService/")} == set(METHODS)
    shown = {call for call, _ in found}
    assert set(calls) == shown, "no test has a mark for these"
    others = ("tensorflow-serving-api", "@grpc/grpc-js", "grpcio", "grpclib", "aiorch_client")
    v2 = [call for call in calls if call.startswith("GRPCInferenceService/")]
    for client, wanted in [*((each, list(calls)) for each in COMPLETE), *((each, v2) for each in others)]:
        gaps = [call for call in wanted if (call, client) not in found and not written["is_lacking"](client, call)]
        assert not gaps, f"no test shows that {client} can make these"
