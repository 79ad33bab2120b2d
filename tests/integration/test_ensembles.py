"""Ensembles on a running server, asked by Triton's own client: what is refused and what fails first, then the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from ensembles import write_ensemble, write_model
from running_site import Site
from tritonclient.utils import InferenceServerException

CHAIN = (("double", {"X": "IN"}, {"Y": "between"}), ("add_one", {"X": "between"}, {"Y": "OUT"}))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("ensembles")
    write_model(root, "double")
    write_model(root, "add_one", "return {'Y': i['X'] + 1}")
    write_model(root, "refuse", "raise ValueError('no')")
    write_ensemble(root, "chain", CHAIN)
    write_ensemble(root, "failing", (("double", {"X": "IN"}, {"Y": "b"}), ("refuse", {"X": "b"}, {"Y": "OUT"})))
    site = Site(root, io_threads=1)
    yield site
    site.close()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Any]:
    client = triton.InferenceServerClient(site.target)
    yield client
    client.close()


def ask(client: Any, model: str, *, outputs: Any = None, id: str = "", **inputs: np.ndarray[Any, Any]) -> Any:
    given = []
    for name, array in inputs.items():
        tensor = triton.InferInput(name, array.shape, {"f": "FP32", "O": "BYTES", "i": "INT32"}[array.dtype.kind])
        tensor.set_data_from_numpy(array)
        given.append(tensor)
    return client.infer(model, given, outputs=outputs, request_id=id, client_timeout=20.0)


def row(*values: float) -> np.ndarray[Any, Any]:
    return np.array([values], np.float32)


def test_a_failing_step_is_named_with_its_ensemble(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, "failing", IN=row(1))
    assert caught.value.status() == "StatusCode.INTERNAL"
    assert caught.value.message() == "in ensemble 'failing', ValueError: no (step 1, model 'refuse')"


def test_a_request_that_does_not_fit_the_ensemble_is_refused_in_its_name(client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"\[request id: 7\] unexpected inference input 'X' .* 'chain'"):
        ask(client, "chain", id="7", IN=row(1), X=row(1))
    with pytest.raises(InferenceServerException, match="batch-size must be <= 8 for 'chain'"):
        ask(client, "chain", IN=np.zeros((9, 1), np.float32))


@pytest.mark.parametrize("width", [3, 100_000])
def test_a_chain_of_two_answers_as_the_models_in_a_row(client: Any, width: int) -> None:
    given = np.arange(width, dtype=np.float32)[None]
    answer = ask(client, "chain", id="7", IN=given)
    np.testing.assert_array_equal(answer.as_numpy("OUT"), given * 2 + 1)
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("chain", "1", "7")
