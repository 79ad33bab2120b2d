"""Every error of the package has an HTTP status, chosen and not fallen into."""

import json

import pytest
from error_tree import ERROR_TREE

import aiorch_server.frontends.rest.server  # noqa: F401 - brings all the error classes of the door
from aiorch_server import errors
from aiorch_server.errors import AiorchError, Code
from aiorch_server.frontends.rest.status import STATUS_BY_CODE, error_body, status_of


def test_the_tree_is_walked():
    assert {errors.UnknownModel, errors.DeadlineExpired, errors.ModelExecutionError} <= set(ERROR_TREE)


@pytest.mark.parametrize("kind", ERROR_TREE, ids=lambda kind: kind.__name__)
def test_every_error_has_a_status(kind):
    assert kind.code in STATUS_BY_CODE
    assert 400 <= status_of(kind("text")) < 600


def test_every_code_but_ok_has_a_status():
    assert set(STATUS_BY_CODE) == set(Code) - {Code.OK}


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.InternalError, 500),
        (errors.ModelExecutionError, 500),
        (errors.UnknownVersion, 404),
        (errors.ModelNotReady, 503),
        (errors.QueueFull, 503),
        (errors.QueueTimeout, 503),
        (errors.ServerStopping, 503),
        (errors.UnsupportedRequest, 501),
        (errors.UnknownModel, 400),
        (errors.RequestError, 400),
        (errors.AlreadyExists, 400),
        (errors.ModelLoadError, 400),
        (errors.RequestCancelled, 400),
        (AiorchError, 400),
        (errors.PayloadTooLarge, 413),
        (errors.DeadlineExpired, 504),
    ],
)
def test_the_statuses_clients_know(kind, status):
    assert status_of(kind("text")) == status


def test_endless_texts_are_cut():
    assert json.loads(error_body("x" * 10_000))["error"] == "x" * 4096 + " [...]"


def test_a_subclass_keeps_the_status_of_its_class():
    class TooLargeStill(errors.PayloadTooLarge):
        pass

    assert status_of(TooLargeStill("text")) == 413


@pytest.mark.parametrize("text", ['a "quoted" text', "zwei\nZeilen", "漢字", "\ud800", ""])
def test_error_documents_are_ascii_json(text):
    body = error_body(text)
    assert body.isascii() and json.loads(body) == {"error": text}
