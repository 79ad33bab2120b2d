"""How ensembles come and go with the models of their steps: what is missing or wrong first, then the rest."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ensemble_gates as gates
import numpy as np
import pytest
import tritonclient.grpc as triton
from ensembles import write_ensemble, write_model
from running_site import Site
from tritonclient.utils import InferenceServerException

TIMEOUT_S = 20.0
CHAIN = (("double", {"X": "IN"}, {"Y": "t"}), ("add_one", {"X": "t"}, {"Y": "OUT"}))
#: Comes before its models by name.
NAME = "a_chain"


class Server:
    """A server in one control mode and Triton's client for it."""

    def __init__(self, root: Path, mode: str, **lifecycle: Any) -> None:
        self.root = root
        self.site = Site(root, io_threads=1, lifecycle={"control_mode": mode, **lifecycle})
        self.client = triton.InferenceServerClient(self.site.target)

    def close(self) -> None:
        self.client.close()
        self.site.close()

    def ask(self, model: str = NAME, value: float = 1) -> float:
        tensor = triton.InferInput("IN", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.array([[value]], np.float32))
        return float(self.client.infer(model, [tensor], client_timeout=TIMEOUT_S).as_numpy("OUT")[0, 0])

    def index(self) -> dict[str, tuple[str, str]]:
        return {each.name: (each.state, each.reason) for each in self.client.get_model_repository_index().models}

    def ready(self) -> set[str]:
        return {name for name, (state, _) in self.index().items() if state == "READY"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path, "double")
    write_model(tmp_path, "add_one", "return {'Y': i['X'] + 1}")
    write_ensemble(tmp_path, NAME, CHAIN)
    return tmp_path


@pytest.fixture
def serve(root: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(mode: str = "explicit", **lifecycle: Any) -> Server:
        servers.append(Server(root, mode, **lifecycle))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.005)


Serve = Callable[..., Server]


def test_a_model_that_is_not_there_or_does_not_load_is_named(root: Path, serve: Serve) -> None:
    write_model(root, "broken", "this is no python")
    wiring = (("absent", {"X": "IN"}, {"Y": "t"}), ("broken", {"X": "t"}, {"Y": "OUT"}))
    write_ensemble(root, "lost", wiring)
    server = serve()
    with pytest.raises(InferenceServerException) as caught:
        server.client.load_model("lost")
    text = caught.value.message()
    assert (
        "ensemble 'lost' depends on 'absent' which has no loaded version. Model 'absent' loading failed with error: "
        "failed to load 'absent', failed to poll from model repository" in text
    )
    assert "ensemble 'lost' depends on 'broken' which has no loaded version. Model 'broken' loading failed" in text
    assert "absent" not in server.index()
    # once they are there, it comes by itself
    write_model(root, "absent")
    write_model(root, "broken")
    server.client.load_model("absent")
    assert server.index()["lost"][0] == "UNAVAILABLE"
    server.client.load_model("broken")
    wait_until(lambda: "lost" in server.ready())
    assert server.ask("lost") == 4


def test_models_that_do_not_fit_are_all_named_at_load(root: Path, serve: Serve) -> None:
    write_model(root, "other", datatype="TYPE_INT32", size=2)
    write_ensemble(root, "unfit", (("other", {"X": "IN"}, {"Y": "t"}), ("double", {"X": "t"}, {"Z": "OUT"})))
    server = serve()
    with pytest.raises(InferenceServerException) as caught:
        server.client.load_model("unfit")
    for part in (
        "ensemble unfit allows maximum batch size 8, but it contains model other which only allows",
        "ensemble tensor IN: inconsistent data type: TYPE_FP32 is inferred from model unfit while TYPE_INT32",
        "ensemble tensor t: inconsistent data type: TYPE_INT32 is inferred from model other while TYPE_FP32",
        "ensemble tensor OUT is mapped from non-existing output Z in model double",
    ):
        assert part in caught.value.message(), part


def test_a_version_that_is_not_loaded_is_named(root: Path, serve: Serve) -> None:
    write_ensemble(root, "exact", (("double", {"X": "IN"}, {"Y": "OUT"}, 3),))
    server = serve()
    with pytest.raises(InferenceServerException, match="depends on 'double' whose required version 3 is not loaded"):
        server.client.load_model("exact")
    shutil.copytree(root / "double" / "1", root / "double" / "3")
    server.client.load_model("double")
    wait_until(lambda: "exact" in server.ready())
    assert server.ask("exact") == 2


@pytest.mark.parametrize("mode", ["none", "explicit"])
def test_ensembles_in_a_ring_fail_and_name_it(root: Path, serve: Serve, mode: str) -> None:
    for name, other in (("ring_one", "ring_two"), ("ring_two", "ring_three"), ("ring_three", "ring_one")):
        write_ensemble(root, name, ((other, {"IN": "IN"}, {"OUT": "OUT"}),))
    server = serve(mode, is_readiness_strict=False)
    if mode == "explicit":
        with pytest.raises(InferenceServerException, match="circular dependency between ensembles: ring_"):
            server.client.load_model("ring_one")
    index = server.index()
    for name in ("ring_one", "ring_two", "ring_three"):
        assert index[name][0] == "UNAVAILABLE"
    told = " ".join(reason for _, reason in index.values())
    assert "circular dependency between ensembles: ring_" in told


def test_an_ensemble_goes_and_comes_back_with_a_model_of_its_steps(root: Path, serve: Serve) -> None:
    server = serve(load_models=("*",))
    write_ensemble(root, "outer", ((NAME, {"IN": "IN"}, {"OUT": "OUT"}),))
    server.client.load_model("outer")
    server.client.unload_model("double")
    index = server.index()
    assert index[NAME] == (
        "UNAVAILABLE",
        f"ensemble '{NAME}' depends on 'double' which has no loaded version",
    )
    assert index["outer"][1].startswith(f"ensemble 'outer' depends on '{NAME}' which has no loaded version")
    assert not server.client.is_model_ready(NAME) and not server.client.is_server_ready()
    with pytest.raises(InferenceServerException, match="has no available versions"):
        server.ask()
    assert "add_one" in server.ready()
    server.client.load_model("double")
    assert {NAME, "outer"} <= server.ready() and server.client.is_server_ready()
    assert server.ask("outer") == 3


def test_a_model_that_is_reloaded_with_other_tensors_withholds_the_ensemble(serve: Serve) -> None:
    server = serve(load_models=("*",))
    config = {
        "backend": "python",
        "max_batch_size": 8,
        "input": [{"name": "X", "data_type": "TYPE_INT32", "dims": [-1]}],
        "output": [{"name": "Y", "data_type": "TYPE_INT32", "dims": [-1]}],
    }
    server.client.load_model("double", config=json.dumps(config))
    state, reason = server.index()[NAME]
    assert state == "UNAVAILABLE" and f"in ensemble {NAME}, ensemble tensor IN: inconsistent data type" in reason
    server.client.load_model("double")
    assert server.ask() == 3


def test_a_request_under_way_is_answered_while_a_step_is_unloaded(root: Path, serve: Serve) -> None:
    before = "import ensemble_gates as gates"
    write_model(root, "held", "gates.hold('unload')\nreturn {'Y': i['X'] * 2}", before=before)
    write_ensemble(root, "slow", (("held", {"X": "IN"}, {"Y": "t"}), ("add_one", {"X": "t"}, {"Y": "OUT"})))
    server = serve(load_models=("*",))
    gates.shut("unload")
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(server.ask, "slow")
        gates.wait_entered("unload")
        unloading = pool.submit(triton.InferenceServerClient(server.site.target).unload_model, "add_one")
        wait_until(lambda: "slow" not in server.ready())
        gates.open_gate("unload")
        assert answer.result(TIMEOUT_S) == 3
        unloading.result(TIMEOUT_S)
    assert "add_one" not in server.ready()


def test_a_step_that_is_reloaded_under_load_costs_no_request(serve: Serve) -> None:
    server = serve(load_models=("*",))
    tensors = {
        field: [{"name": name, "data_type": "TYPE_FP32", "dims": [-1]}]
        for field, name in (("input", "X"), ("output", "Y"))
    }
    config = json.dumps({"backend": "python", "max_batch_size": 8, **tensors})
    is_over = threading.Event()

    def keep_asking() -> int:
        client = triton.InferenceServerClient(server.site.target)
        n_asked = 0
        while not is_over.is_set():
            tensor = triton.InferInput("IN", [1, 1], "FP32")
            tensor.set_data_from_numpy(np.array([[n_asked]], np.float32))
            assert client.infer(NAME, [tensor], client_timeout=TIMEOUT_S).as_numpy("OUT")[0, 0] == n_asked * 2 + 1
            n_asked += 1
        client.close()
        return n_asked

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking) for _ in range(3)]
        try:
            for name in ("double", "add_one") * 5:
                server.client.load_model(name, config=config)
        finally:
            is_over.set()
        assert min(future.result(TIMEOUT_S) for future in asking) > 0


@pytest.mark.parametrize("name", ["slow", "outer"])
def test_a_request_under_way_is_answered_when_the_server_stops(root: Path, serve: Serve, name: str) -> None:
    before = "import ensemble_gates as gates"
    write_model(root, "held", "gates.hold('stop')\nreturn {'Y': i['X'] * 2}", before=before)
    write_ensemble(root, "slow", (("held", {"X": "IN"}, {"Y": "t"}), (NAME, {"IN": "t"}, {"OUT": "OUT"})))
    write_ensemble(root, "outer", (("slow", {"IN": "IN"}, {"OUT": "OUT"}),))
    server = serve(load_models=("*",))
    gates.shut("stop")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, name)
        gates.wait_entered("stop")
        stopping = server.site.begin_stop(TIMEOUT_S)
        wait_until(lambda: server.site.application.manager.is_stopping)
        gates.open_gate("stop")
        assert answer.result(TIMEOUT_S) == 5
        stopping.result(TIMEOUT_S)


def test_what_does_not_end_within_the_grace_is_failed(root: Path, serve: Serve) -> None:
    before = "import ensemble_gates as gates"
    write_model(root, "held", "gates.hold('grace')\nreturn {'Y': i['X'] * 2}", before=before)
    write_ensemble(root, "slow", (("held", {"X": "IN"}, {"Y": "t"}), ("add_one", {"X": "t"}, {"Y": "OUT"})))
    server = serve(load_models=("*",), exit_timeout_secs=0.2)
    gates.shut("grace")
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.ask, "slow")
            gates.wait_entered("grace")
            server.client.unload_model("slow")
            with pytest.raises(InferenceServerException, match="'slow' version 1 was unloaded before the request"):
                answer.result(TIMEOUT_S)
    finally:
        gates.open_gate("grace")
    assert server.index()["slow"] == ("UNAVAILABLE", "unloaded")


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_all_are_loaded_at_start_in_an_order_that_works(serve: Serve, mode: str) -> None:
    server = serve(mode)
    assert server.ready() == {NAME, "double", "add_one"} and server.client.is_server_ready()
    assert server.ask() == 3


def test_a_load_brings_the_models_and_unload_dependents_takes_them_along(root: Path, serve: Serve) -> None:
    write_ensemble(root, "outer", ((NAME, {"IN": "IN"}, {"OUT": "OUT"}),))
    server = serve()
    server.client.load_model("outer")
    assert server.ready() == {"outer", NAME, "double", "add_one"}
    server.client.unload_model("outer", unload_dependents=True)
    assert server.ready() == set()
    assert {reason for _, reason in server.index().values()} == {"unloaded"}
    server.client.load_model("outer")
    server.client.unload_model("outer")
    assert server.ready() == {NAME, "double", "add_one"}


def test_unload_dependents_leaves_what_somebody_asked_for_or_needs(root: Path, serve: Serve) -> None:
    write_ensemble(root, "other", (("add_one", {"X": "IN"}, {"Y": "OUT"}),))
    server = serve()
    server.client.load_model("double")
    server.client.load_model(NAME)
    server.client.load_model("other")
    server.client.unload_model(NAME, unload_dependents=True)
    assert server.ready() == {"double", "add_one", "other"}
    server.client.unload_model("other", unload_dependents=True)
    assert server.ready() == {"double"}


def test_polling_follows_models_of_steps_that_go_and_come(root: Path, serve: Serve) -> None:
    server = serve("poll", poll_secs=3600)
    manager = server.site.application.manager
    shutil.move(root / "double", root / ".away")
    server.site.run(manager.poll())
    assert "ensemble 'a_chain' depends on 'double'" in server.index()[NAME][1]
    shutil.move(root / ".away", root / "double")
    server.site.run(manager.poll())
    assert server.ask() == 3
    write_ensemble(root, NAME, ((*CHAIN[0][:2], {"Y": "OUT"}),))
    server.site.run(manager.poll())
    assert server.ask() == 2


def test_a_withheld_ensemble_can_be_unloaded_and_loaded(serve: Serve) -> None:
    server = serve()
    server.client.load_model(NAME)
    server.client.unload_model("double")
    server.client.unload_model(NAME)
    assert server.index()[NAME] == ("UNAVAILABLE", "unloaded")
    server.client.load_model("double")
    assert NAME not in server.ready()
    server.client.unload_model("double")
    server.client.load_model(NAME)
    assert server.ask() == 3


def test_a_ring_is_unloaded_once(root: Path, serve: Serve) -> None:
    write_ensemble(root, "ring_a", (("ring_b", {"IN": "IN"}, {"OUT": "OUT"}),))
    write_ensemble(root, "ring_b", (("ring_a", {"IN": "IN"}, {"OUT": "OUT"}),))
    server = serve()
    for name in ("ring_a", "ring_b"):
        with pytest.raises(InferenceServerException):
            server.client.load_model(name)
    server.client.unload_model("ring_a", unload_dependents=True)
    assert not server.ready()
