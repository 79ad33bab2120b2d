"""Which of two statuses of a stream is the server's: grpc.aio may put one of its own beside it, in either place."""

from __future__ import annotations

import grpc
import pytest
from aiorch_client.aio_connection import choose_status
from grpc.aio import AioRpcError, Metadata

CORE = (grpc.StatusCode.INTERNAL, "Internal error from Core", None)
SERVER = (grpc.StatusCode.NOT_FOUND, "bad request", None)


def make_error(code: grpc.StatusCode, details: str) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), details=details)


@pytest.mark.parametrize("announced", [[CORE], [SERVER], [CORE, SERVER], []])
def test_the_servers_status_is_raised(announced: list[tuple[grpc.StatusCode, str, None]]) -> None:
    raised = CORE if SERVER in announced else SERVER
    code, details, _ = choose_status(announced, make_error(*raised[:2]))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "bad request")


@pytest.mark.parametrize("announced", [[CORE], []])
def test_one_of_grpcs_own_where_there_is_no_other(announced: list[tuple[grpc.StatusCode, str, None]]) -> None:
    code, details, _ = choose_status(announced, make_error(*CORE[:2]))
    assert (code, details) == (grpc.StatusCode.INTERNAL, "Internal error from Core")
