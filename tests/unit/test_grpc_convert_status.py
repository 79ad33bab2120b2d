"""Every error of the package has a gRPC status; nothing else tells a client anything."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from error_tree import ERROR_TREE

from aiorch_server.errors import AiorchError, Code
from aiorch_server.frontends.grpc.status import MAX_TEXT_BYTES, bound_text, describe_error, to_status


@pytest.mark.parametrize("error", ERROR_TREE, ids=lambda error: error.__name__)
def test_error_has_a_status(error: type[AiorchError]) -> None:
    code, text = describe_error(error("what is wrong"))
    assert code.value[0] == error.code
    assert code is not grpc.StatusCode.OK
    assert text == (error.told or "what is wrong")


def test_tree_was_walked() -> None:
    assert len(ERROR_TREE) >= 20


def test_codes_are_numbered_as_grpc_does() -> None:
    assert {code: to_status(code).value[0] for code in Code} == {code: int(code) for code in Code}
    assert {to_status(code) for code in Code} == set(grpc.StatusCode)


def test_unexpected_error_is_logged_and_hidden(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ZeroDivisionError("secret of the house")
    except ZeroDivisionError as error:
        with caplog.at_level(logging.ERROR):
            assert describe_error(error) == (grpc.StatusCode.INTERNAL, "internal error")
    record = caplog.records[-1]
    assert record.exc_info and record.exc_info[2] is not None


def test_cancellation_is_no_error() -> None:
    assert not issubclass(asyncio.CancelledError, Exception)


@pytest.mark.parametrize("text", ["", "short", "é" * 100, "a" * MAX_TEXT_BYTES])
def test_texts_that_fit_stay(text: str) -> None:
    assert bound_text(text) == text


@pytest.mark.parametrize("char", ["a", "é", "\n", "%", "\U0001f600"])
def test_long_texts_are_cut(char: str) -> None:
    text = bound_text(char * 100_000)
    assert text.endswith(" [...]")
    assert set(text.removesuffix(" [...]")) == {char}
    assert MAX_TEXT_BYTES - 3 <= len(text.encode()) <= MAX_TEXT_BYTES


def test_lone_surrogates_become_valid() -> None:
    assert bound_text("file \udcff") == "file ?"
