"""The lifecycle on a real repository, scheduler, router and data plane: failures and crashes first, then the rest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiorch_server._core import Mailbox, Router
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.config.server import LifecycleConfig
from aiorch_server.controlplane import ControlPlane
from aiorch_server.dataplane import DataPlane
from aiorch_server.errors import (
    AiorchError,
    BackendError,
    Code,
    LoadNotAllowed,
    ModelLoadError,
    ModelNotReady,
    OverrideRefused,
    RequestError,
    ServerStopping,
    UnknownModel,
    UnknownVersion,
)
from aiorch_server.lifecycle.backends import BackendRegistry
from aiorch_server.lifecycle.loader import Loader
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.repository import FilesystemRepository
from aiorch_server.types import (
    DataType,
    InferenceRequest,
    ModelIndexEntry,
    ModelSignature,
    ModelState,
    NumpyArray,
    RequestedOutput,
    Tensor,
    TensorSpec,
)

POISON, EXIT = 13, 666
DEADLINE_S = 15.0


class ScriptedInstance(ModelInstance):
    """Multiplies by the factor of its artefact; waits at the gate of its model while one is there."""

    def __init__(self, backend: ScriptedBackend, name: str, factor: int) -> None:
        self.backend = backend
        self.name = name
        self.factor = factor

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        x = inputs["X"]
        gate = self.backend.gates.get(self.name)
        if gate is not None and x.any():  # a warm-up passes
            self.backend.entered.set()
            gate.wait(DEADLINE_S)
        if POISON in x:
            raise ValueError("poison")
        if EXIT in x:
            raise SystemExit("the model called exit")
        return {"Y": x * self.factor}

    def close(self) -> None:
        self.backend.closed += 1


class ScriptedBackend(Backend):
    """The artefact is a JSON object: ``factor``, ``fail`` (a text), ``hang`` (loads when the gate opens),
    ``exit`` (a text: leaves the interpreter when it is looked at)."""

    name = "scripted"
    platforms = ("scripted_json",)
    artefacts = ("model.json",)
    runs_code = False

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.entered = threading.Event()
        self.loading = threading.Event()
        self.loads: list[tuple[str, int]] = []
        self.closed = 0

    def inspect(self, context: LoadContext) -> ModelSignature:
        try:
            script = json.loads(context.artefact.read_text())
        except ValueError:
            raise ModelLoadError(f"'{context.artefact.name}' is not JSON") from None
        if "exit" in script:
            sys.exit(script["exit"])
        size = context.declared.max_batch_size
        return ModelSignature(
            (TensorSpec("X", DataType.INT32, (1,)),),
            (TensorSpec("Y", DataType.INT32, (1,)),),
            max_batch_size=context.default_max_batch_size if size is None else size,
        )

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        script = json.loads(context.artefact.read_text())
        self.loads.append((context.model_name, context.model_version))
        if "fail" in script:
            raise RuntimeError(script["fail"])
        if script.get("hang"):
            self.loading.set()
            self.gates[context.model_name].wait(DEADLINE_S)
        return ScriptedInstance(self, context.model_name, script.get("factor", 2))


class Rig:
    """A repository folder, and a manager with both planes over it."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        self.backend = ScriptedBackend()
        registry = BackendRegistry()
        registry.add(self.backend)
        self.entries: list[ModelIndexEntry] = []
        self.router = Router()
        loader_options = {key: options.pop(key) for key in ("startup_timeout_s",) if key in options}
        strict = options.pop("strict", True)
        self.manager = LifecycleManager(
            FilesystemRepository([root]),
            Loader(registry, **loader_options),
            self.router,
            observe=self.entries.append,
            **options,
        )
        self.mailbox = Mailbox(asyncio.get_running_loop())
        self.dataplane = DataPlane(self.manager, self.mailbox)
        self.controlplane = ControlPlane(self.manager, LifecycleConfig(is_readiness_strict=strict))

    def write(self, name: str, versions: Mapping[int, Any], config: str | None = None) -> None:
        """Adds or changes versions; a string is written as it is."""
        for version, script in versions.items():
            folder = self.root / name / str(version)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "model.json"
            new = folder / ".new"
            new.write_text(script if isinstance(script, str) else json.dumps(script))
            new.replace(path)
        if config is not None:
            (self.root / name / "config.pbtxt").write_text(config)

    async def infer(self, name: str, value: int = 1, version: str = "") -> int:
        data = np.array([[value]], np.int32).tobytes()
        request = InferenceRequest(name, version, [Tensor("X", "INT32", (1, 1), data)])
        response = await asyncio.wait_for(self.dataplane.infer(request), DEADLINE_S)
        assert response.outputs[0].data is not None
        return int(np.frombuffer(response.outputs[0].data, np.int32)[0])

    def index(self, name: str) -> list[tuple[str, str]]:
        return [(entry.version, entry.state.value) for entry in self.manager.index() if entry.name == name]

    def reasons(self, name: str) -> str:
        return "; ".join(entry.reason for entry in self.manager.index() if entry.name == name)


@contextlib.asynccontextmanager
async def running(root: Path, models: Mapping[str, Mapping[int, Any]], **options: Any) -> AsyncIterator[Rig]:
    rig = Rig(root, **options)
    for name, versions in models.items():
        rig.write(name, versions)
    try:
        await asyncio.wait_for(rig.manager.start(), DEADLINE_S)
        yield rig
    finally:
        for gate in rig.backend.gates.values():
            gate.set()
        await asyncio.wait_for(rig.manager.stop(DEADLINE_S), DEADLINE_S)
        rig.mailbox.close()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def see(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, DEADLINE_S)


async def outcome(work: Any) -> Any:
    """The result, or the error as a value."""
    return (await asyncio.gather(work, return_exceptions=True))[0]


# crashes and failures


async def test_one_poisoned_request_in_a_batch_of_many_harms_only_itself(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {"factor": 3}}}) as rig:
        gate = rig.backend.gates["m"] = threading.Event()
        first = asyncio.ensure_future(rig.infer("m", 1))
        await see(rig.backend.entered)  # the instance is busy: the others meet in one batch
        values = [*range(2, 12), POISON, *range(20, 30)]
        others = [asyncio.ensure_future(rig.infer("m", value)) for value in values]
        await eventually(lambda: rig.manager.find("m").scheduler.pending == len(values))
        gate.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        for value, result in zip([1, *values], results, strict=True):
            if value == POISON:
                assert isinstance(result, AiorchError)
                assert (result.code, str(result)) == (Code.INTERNAL, "model 'm' failed: ValueError: poison")
            else:
                assert result == 3 * value


async def test_a_crashed_instance_makes_the_version_unavailable_and_leaves_nobody_waiting(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}, "other": {1: {}}}, control_mode="explicit", load_models=["*"]) as rig:
        gate = rig.backend.gates["m"] = threading.Event()
        fatal = asyncio.ensure_future(rig.infer("m", EXIT))
        await see(rig.backend.entered)
        queued = [asyncio.ensure_future(rig.infer("m", value)) for value in range(1, 6)]
        await eventually(lambda: rig.manager.find("m").scheduler.pending == 5)
        gate.set()
        results = await asyncio.wait_for(asyncio.gather(fatal, *queued, return_exceptions=True), DEADLINE_S)
        assert [result.code for result in results if isinstance(result, AiorchError)] == [Code.INTERNAL] + 5 * [
            Code.UNAVAILABLE
        ]
        await eventually(lambda: rig.index("m") == [("1", "UNAVAILABLE")])
        assert "SystemExit: the model called exit" in rig.reasons("m")
        assert not rig.controlplane.is_ready()
        with pytest.raises(UnknownVersion, match="'m' has no available versions"):
            await rig.infer("m")
        assert await rig.infer("other") == 2
        await rig.manager.load("m")
        assert await rig.infer("m") == 2
        assert rig.controlplane.is_ready()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ({"fail": "weights are missing"}, "RuntimeError: weights are missing"),
        ("{ garbage", "'model.json' is not JSON"),
        ({"exit": "bye"}, "SystemExit: bye"),
    ],
)
async def test_a_broken_model_does_not_keep_the_server_from_starting(tmp_path: Path, script: Any, reason: str) -> None:
    async with running(tmp_path, {"bad": {1: script}, "good": {1: {}}}) as rig:
        assert await rig.infer("good") == 2
        assert rig.index("bad") == [("1", "UNAVAILABLE")]
        assert reason in rig.reasons("bad")
        assert "bad" in rig.manager.problems()
        assert not rig.controlplane.is_ready()
        with pytest.raises(ModelNotReady, match="'bad' version 1 is not at ready state"):
            await rig.infer("bad", version="1")


async def test_models_without_versions_artefact_or_a_right_configuration_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing" / "1").mkdir(parents=True)
    (tmp_path / "typo" / "1").mkdir(parents=True)
    (tmp_path / "typo" / "config.pbtxt").write_text("max_batch_sice: 4")
    async with running(tmp_path, {"good": {1: {}}}, strict=False) as rig:
        assert "no version folder" in rig.reasons("empty")
        assert rig.index("nothing") == [("1", "UNAVAILABLE")]
        assert rig.reasons("nothing")
        assert rig.index("typo") == [("", "UNAVAILABLE")]
        assert "max_batch_sice" in rig.reasons("typo")
        assert set(rig.manager.problems()) == {"empty", "nothing", "typo"}
        assert rig.controlplane.is_ready(), "readiness is not strict"
        with pytest.raises(UnknownModel, match="'typo' is not found"):
            await rig.infer("typo")


async def test_a_failed_reload_leaves_the_old_version_serving_and_says_why(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {"factor": 2}}}, control_mode="explicit", load_models=["m"]) as rig:
        rig.write("m", {1: {"fail": "a bad day"}})
        with pytest.raises(ModelLoadError, match=r"load failed for model 'm': version 1: .*a bad day"):
            await rig.manager.load("m")
        assert rig.index("m") == [("1", "READY")]
        assert "still serving" in rig.reasons("m")
        assert "a bad day" in rig.reasons("m")
        assert await rig.infer("m", 4) == 8
        assert rig.controlplane.is_ready()
        rig.write("m", {2: {"fail": "worse"}})
        with pytest.raises(ModelLoadError, match=r"version 2: .*worse"):
            await rig.manager.load("m")
        assert await rig.infer("m", 4) == 8
        (tmp_path / "m" / "config.pbtxt").write_text("nonsense")
        with pytest.raises(ModelLoadError, match="load failed for model 'm': "):
            await rig.manager.load("m")
        assert await rig.infer("m", 4) == 8
        (tmp_path / "m" / "config.pbtxt").unlink()
        rig.write("m", {2: {"factor": 5}})
        await rig.manager.load("m")
        assert await rig.infer("m", 4) == 20
        assert rig.index("m") == [("1", "UNAVAILABLE"), ("2", "READY")]
        assert rig.reasons("m") == "unloaded; "


async def test_a_load_that_hangs_is_given_up_and_its_instance_closed_when_it_comes(tmp_path: Path) -> None:
    rig = Rig(tmp_path, control_mode="explicit", startup_timeout_s=0.2)
    gate = rig.backend.gates["m"] = threading.Event()
    rig.write("m", {1: {"hang": True}})
    await rig.manager.start()
    with pytest.raises(ModelLoadError, match="did not finish loading within"):
        await rig.manager.load("m")
    gate.set()
    await eventually(lambda: rig.backend.closed == 1)
    rig.write("m", {1: {}})
    await rig.manager.load("m")
    assert await rig.infer("m") == 2
    await rig.manager.stop(DEADLINE_S)
    rig.mailbox.close()


async def test_who_cancels_a_load_does_not_cancel_the_loading(tmp_path: Path) -> None:
    async with running(tmp_path, {}, control_mode="explicit") as rig:
        gate = rig.backend.gates["m"] = threading.Event()
        rig.write("m", {1: {"hang": True}})
        load = asyncio.ensure_future(rig.manager.load("m"))
        await see(rig.backend.loading)
        load.cancel()
        assert isinstance(await outcome(load), asyncio.CancelledError)
        gate.set()
        await eventually(lambda: rig.manager.is_ready("m"))
        assert rig.backend.loads == [("m", 1)]


async def test_an_unexpected_failure_of_one_step_waits_for_the_loads_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a model goes on loading for an ensemble that nobody loads any more."""
    steps = " ".join(
        f'step {{ model_name: "{name}" model_version: -1 input_map {{ key: "X" value: "X" }} '
        f'output_map {{ key: "Y" value: "{output}" }} }}'
        for name, output in (("slow", "A"), ("odd", "B"))
    )
    inputs = 'input { name: "X" data_type: TYPE_INT32 dims: [1] }'
    outputs = " ".join(f'output {{ name: "{name}" data_type: TYPE_INT32 dims: [1] }}' for name in "AB")
    async with running(tmp_path, {"slow": {1: {"hang": True}}, "odd": {1: {}}}, control_mode="explicit") as rig:
        (tmp_path / "both" / "1").mkdir(parents=True)
        config = f"max_batch_size: 8 {inputs} {outputs} ensemble_scheduling {{ {steps} }}"
        (tmp_path / "both" / "config.pbtxt").write_text(config)
        rig.backend.gates["slow"] = threading.Event()
        opening = FilesystemRepository.open

        def open_model(self: FilesystemRepository, name: str, *more: Any) -> Any:
            if name == "odd":
                raise RuntimeError("unheard of")
            return opening(self, name, *more)

        monkeypatch.setattr(FilesystemRepository, "open", open_model)
        load = asyncio.create_task(rig.manager.load("both"))
        await see(rig.backend.loading)
        await eventually(lambda: load.done() or "RuntimeError" in rig.manager.problems().get("odd", ""))
        assert not load.done()
        rig.backend.gates["slow"].set()
        error = await outcome(load)
        assert isinstance(error, ModelLoadError)
        assert "load failed for model 'odd': unexpected RuntimeError" in str(error)
        assert rig.index("slow") == [("1", "READY")]


async def test_an_output_that_is_asked_for_many_times_is_given_once(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}}) as rig:
        inputs = [Tensor("X", "INT32", (1, 1), np.array([[4]], np.int32).tobytes())]
        request = InferenceRequest("m", "", inputs, [RequestedOutput("Y")] * 100)
        response = await asyncio.wait_for(rig.dataplane.infer(request), DEADLINE_S)
        assert [output.name for output in response.outputs] == ["Y"]


# unload and stop while requests are under way


async def test_unload_answers_what_was_taken_and_refuses_what_comes(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}}, control_mode="explicit", load_models=["m"]) as rig:
        gate = rig.backend.gates["m"] = threading.Event()
        taken = [asyncio.ensure_future(rig.infer("m", 1))]
        await see(rig.backend.entered)
        taken += [asyncio.ensure_future(rig.infer("m", value)) for value in range(2, 9)]
        await eventually(lambda: rig.manager.find("m").scheduler.pending == 7)
        unload = asyncio.ensure_future(rig.manager.unload("m"))
        await eventually(lambda: rig.index("m") == [("1", "UNLOADING")])
        with pytest.raises(ModelNotReady, match="'m' version 1 is not at ready state"):
            await rig.infer("m", version="1")
        assert not unload.done()
        gate.set()
        assert await asyncio.gather(*taken) == [2 * value for value in range(1, 9)]
        await asyncio.wait_for(unload, DEADLINE_S)
        assert [(e.state, e.reason) for e in rig.manager.index()] == [(ModelState.UNAVAILABLE, "unloaded")]
        assert rig.controlplane.is_ready(), "unloaded is as wanted"
        assert rig.backend.closed == 1
        with pytest.raises(UnknownVersion, match="'m' has no available versions"):
            await rig.infer("m")


async def test_unload_waits_for_leases(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}}, control_mode="explicit", load_models=["m"]) as rig:
        handle = rig.manager.acquire("m")
        unload = asyncio.ensure_future(rig.manager.unload("m"))
        await eventually(lambda: rig.index("m") == [("1", "UNLOADING")])
        with pytest.raises(ModelNotReady):
            handle.servable.acquire()
        assert not handle.servable.scheduler.is_closed, "who holds a lease may still submit"
        handle.release()
        handle.release()
        await asyncio.wait_for(unload, DEADLINE_S)
        assert handle.servable.leases == 0


async def test_an_unload_that_takes_too_long_fails_the_queue_and_ends(tmp_path: Path) -> None:
    options: dict[str, Any] = {"control_mode": "explicit", "load_models": ["m"], "drain_timeout_s": 0.1}
    async with running(tmp_path, {"m": {1: {}}}, **options) as rig:
        gate = rig.backend.gates["m"] = threading.Event()
        stuck = asyncio.ensure_future(rig.infer("m", 1))
        await see(rig.backend.entered)
        queued = asyncio.ensure_future(rig.infer("m", 2))
        await eventually(lambda: rig.manager.find("m").scheduler.pending == 1)
        await asyncio.wait_for(rig.manager.unload("m"), DEADLINE_S)
        error = await outcome(queued)
        assert isinstance(error, AiorchError)
        assert error.code == Code.UNAVAILABLE
        assert "was unloaded before the request could run" in str(error)
        gate.set()
        assert await stuck == 2, "a batch that runs is answered when the model returns"


async def test_stop_answers_what_is_under_way_and_refuses_the_rest(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}, "n": {1: {}}}) as rig:
        gate = rig.backend.gates["m"] = threading.Event()
        taken = [asyncio.ensure_future(rig.infer("m", 1))]
        await see(rig.backend.entered)
        taken += [asyncio.ensure_future(rig.infer("m", value)) for value in range(2, 9)]
        await eventually(lambda: rig.manager.find("m").scheduler.pending == 7)
        stop = asyncio.ensure_future(rig.manager.stop(DEADLINE_S))
        await asyncio.sleep(0)
        for name in ("m", "n"):
            with pytest.raises(ServerStopping, match="Server is stopping, scheduler for model has stopped accepting"):
                await rig.infer(name)
        with pytest.raises(ServerStopping, match="Server exiting"):
            rig.controlplane.is_ready()
        with pytest.raises(ServerStopping, match="Server exiting"):
            rig.controlplane.is_live()
        with pytest.raises(ServerStopping, match="Server not ready"):
            rig.controlplane.model_ready("m")
        gate.set()
        assert await asyncio.gather(*taken) == [2 * value for value in range(1, 9)]
        await asyncio.wait_for(stop, DEADLINE_S)
        assert rig.backend.closed == 2
        assert {entry.state for entry in rig.manager.index()} == {ModelState.UNAVAILABLE}


async def test_what_is_not_finished_after_the_grace_is_failed(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}}) as rig:
        rig.backend.gates["m"] = threading.Event()
        stuck = asyncio.ensure_future(rig.infer("m", 1))
        await see(rig.backend.entered)
        queued = [asyncio.ensure_future(rig.infer("m", value)) for value in (2, 3)]
        await eventually(lambda: rig.manager.find("m").scheduler.pending == 2)
        await asyncio.wait_for(rig.manager.stop(0.1), DEADLINE_S)
        for work in queued:
            error = await asyncio.wait_for(outcome(work), DEADLINE_S)
            assert isinstance(error, AiorchError)
            assert error.code == Code.UNAVAILABLE
            assert "Server is stopping" in str(error)
        rig.backend.gates["m"].set()
        assert await stuck == 2


async def test_stop_gives_up_a_load_that_is_under_way(tmp_path: Path) -> None:
    async with running(tmp_path, {}, control_mode="explicit") as rig:
        gate = rig.backend.gates["m"] = threading.Event()
        rig.write("m", {1: {"hang": True}})
        load = asyncio.ensure_future(rig.manager.load("m"))
        await see(rig.backend.loading)
        await asyncio.wait_for(rig.manager.stop(DEADLINE_S), DEADLINE_S)
        assert isinstance(await outcome(load), ServerStopping)
        assert rig.index("m") == [("1", "UNAVAILABLE")]
        with pytest.raises(ServerStopping):
            await rig.manager.load("m")
        gate.set()
        await eventually(lambda: rig.backend.closed == 1)


async def test_stop_is_safe_to_repeat_and_without_a_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.manager.stop(1)
    await asyncio.gather(rig.manager.stop(1), rig.manager.stop(1))
    rig.mailbox.close()


# swaps


async def test_a_swap_under_load_loses_no_request(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {"factor": 1}}}, control_mode="explicit", load_models=["m"]) as rig:
        done = asyncio.Event()
        answers: list[int] = []

        async def client() -> None:
            while not done.is_set():
                answers.append(await rig.infer("m", 1))

        clients = [asyncio.ensure_future(client()) for _ in range(16)]
        await eventually(lambda: bool(answers))
        for factor in range(2, 8):
            rig.write("m", {1: {"factor": factor}})
            await rig.manager.load("m")
            seen = len(answers)
            await eventually(lambda seen=seen: len(answers) > seen + 50)  # type: ignore[misc]
            assert set(answers[seen + 16 :]) == {factor}, "after the swap only the new one answers"
        done.set()
        await asyncio.gather(*clients)
        assert set(answers) == set(range(1, 8))
        assert rig.backend.closed == 6


async def test_a_new_version_takes_over_before_the_old_one_goes(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {"factor": 1}}}, control_mode="explicit", load_models=["m"]) as rig:
        gate = rig.backend.gates["m"] = threading.Event()
        rig.write("m", {2: {"factor": 2, "hang": True}})
        load = asyncio.ensure_future(rig.manager.load("m"))
        await see(rig.backend.loading)
        assert rig.index("m") == [("1", "READY"), ("2", "LOADING")]
        assert rig.manager.versions("m") == [1]
        gate.set()
        await load
        assert rig.manager.versions("m") == [2]
        assert await rig.infer("m", 5) == 10
        with pytest.raises(ModelNotReady, match="version 1 is not at ready state"):
            await rig.infer("m", 5, "1")
        steps = [(e.version, e.state) for e in rig.entries if e.name == "m"]
        assert steps.index(("2", ModelState.READY)) < steps.index(("1", ModelState.UNLOADING))


async def test_several_versions_serve_side_by_side(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write("m", {v: {"factor": v} for v in (1, 2, 3)}, "version_policy { specific { versions: [1, 3] } }")
    await rig.manager.start()
    assert [await rig.infer("m", 1, version) for version in ("", "1", "3")] == [3, 1, 3]
    with pytest.raises(UnknownVersion, match="'m' version 2 is not found"):
        await rig.infer("m", 1, "2")
    metadata = rig.controlplane.model_metadata("m")
    assert (metadata.versions, metadata.platform) == (("1", "3"), "scripted_json")
    assert metadata.inputs[0].shape == (-1, 1)
    assert [(s.version, s.success.count) for s in rig.controlplane.statistics("m")] == [("1", 1), ("3", 2)]
    await rig.manager.stop(DEADLINE_S)
    rig.mailbox.close()


async def test_a_policy_that_names_a_missing_version_serves_the_others_and_says_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write("m", {1: {}}, "version_policy { specific { versions: [1, 7] } }")
    await rig.manager.start()
    assert await rig.infer("m") == 2
    assert "asks for version 7" in rig.reasons("m")
    await rig.manager.stop(DEADLINE_S)
    rig.mailbox.close()


# who may load what


async def test_mode_none_serves_all_and_refuses_changes(tmp_path: Path) -> None:
    async with running(tmp_path, {"a": {1: {}}, "b": {1: {}}}) as rig:
        assert [servable.name for servable in rig.manager.servables()] == ["a", "b"]
        for change in (rig.manager.load("a"), rig.manager.unload("a")):
            with pytest.raises(LoadNotAllowed, match="explicit model load / unload is not allowed if polling is enabl"):
                await change
        assert LoadNotAllowed.code == Code.UNAVAILABLE


async def test_mode_explicit_starts_with_its_list_and_loads_by_name(tmp_path: Path) -> None:
    options: dict[str, Any] = {"control_mode": "explicit", "load_models": ["a", "ghost"]}
    async with running(tmp_path, {"a": {1: {}}, "b": {1: {}}}, **options) as rig:
        assert rig.index("a") == [("1", "READY")]
        assert rig.index("b") == [("", "UNKNOWN")]
        assert "failed to poll from model repository" in rig.reasons("ghost")
        with pytest.raises(UnknownModel, match="'b' is not found"):
            await rig.infer("b")
        await rig.manager.load("b")
        assert await rig.infer("b") == 2
        loads = len(rig.backend.loads)
        await rig.manager.load("b")
        assert len(rig.backend.loads) == loads, "nothing changed, nothing is loaded again"
        await rig.manager.unload("b")
        await rig.manager.unload("b")
        await rig.manager.load("b")
        assert await rig.infer("b") == 2


@pytest.mark.parametrize("name", ["nobody", "x" * 300])
async def test_a_load_of_an_unknown_model_leaves_no_trace(tmp_path: Path, name: str) -> None:
    async with running(tmp_path, {}, control_mode="explicit") as rig:
        with pytest.raises((BackendError, RequestError)) as caught:
            await rig.manager.load(name)
        if name == "nobody":
            assert caught.value.code == Code.INTERNAL
            assert str(caught.value) == "failed to load 'nobody', failed to poll from model repository"
            with pytest.raises(UnknownModel):
                await rig.manager.unload(name)
        assert rig.manager.index() == []


@pytest.mark.parametrize("name", ["../m", "m/../m", "/etc", ".", "..", "a\\b", ""])
async def test_names_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    async with running(tmp_path, {"m": {1: {}}}, control_mode="explicit") as rig:
        for change in (rig.manager.load(name), rig.manager.unload(name)):
            with pytest.raises(AiorchError) as caught:
                await change
            assert caught.value.code == Code.INVALID_ARGUMENT
        with pytest.raises(UnknownModel):
            rig.manager.acquire(name)


async def test_a_configuration_and_files_in_the_request_replace_what_is_stored(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {"factor": 2}}}, control_mode="explicit", load_models=["m"]) as rig:
        await rig.manager.load("m", json.dumps({"max_batch_size": 4}))
        assert rig.controlplane.model_config("m").max_batch_size == 4
        await rig.manager.load("m", json.dumps({"backend": "scripted"}), {"5/model.json": b'{"factor": 7}'})
        assert rig.manager.versions("m") == [5]
        assert await rig.infer("m", 2) == 14
        folder = rig.manager.find("m").instances.contexts[0].model_directory
        assert folder.exists()
        await rig.manager.load("m")
        assert rig.manager.versions("m") == [1]
        assert rig.controlplane.model_config("m").max_batch_size == 32
        assert await rig.infer("m", 2) == 4
        await eventually(lambda: not folder.exists())
        with pytest.raises(RequestError, match="config"):
            await rig.manager.load("m", None, {"1/model.json": b"{}"})
        with pytest.raises(OverrideRefused, match="max_batch_size"):
            await rig.manager.load("m", json.dumps({"max_batch_size": -3}))
        assert await rig.infer("m", 2) == 4


async def test_loads_of_one_model_are_serial_and_the_last_one_wins(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}}, control_mode="explicit", load_models=["m"]) as rig:
        await asyncio.gather(*(rig.manager.load("m", json.dumps({"max_batch_size": n})) for n in range(1, 9)))
        assert rig.controlplane.model_config("m").max_batch_size == 8
        assert await rig.infer("m") == 2
        assert rig.backend.closed == 8


# polling


async def test_polling_follows_what_is_added_changed_and_removed(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {"factor": 1}}, "bad": {1: {"fail": "no"}}}, control_mode="poll") as rig:
        with pytest.raises(LoadNotAllowed):
            await rig.manager.load("m")
        rig.write("new", {1: {"factor": 4}})
        await rig.manager.poll()
        assert await rig.infer("new") == 4
        loads = len(rig.backend.loads)
        await rig.manager.poll()
        assert len(rig.backend.loads) == loads, "nothing changed: not even what failed is tried again"
        rig.write("m", {1: {"factor": 11}})
        await rig.manager.poll()
        assert await rig.infer("m") == 11
        rig.write("m", {2: {"factor": 22}})
        await rig.manager.poll()
        assert await rig.infer("m") == 22
        shutil.rmtree(tmp_path / "m" / "2")
        await rig.manager.poll()
        assert await rig.infer("m") == 11
        rig.write("bad", {1: {}})
        await rig.manager.poll()
        assert await rig.infer("bad") == 2
        rig.write("m", {}, "max_batch_size: 3")
        await rig.manager.poll()
        assert rig.controlplane.model_config("m").max_batch_size == 3
        shutil.rmtree(tmp_path / "m")
        await rig.manager.poll()
        with pytest.raises(UnknownModel, match="'m' is not found"):
            await rig.infer("m")
        assert rig.index("m") == []
        assert rig.controlplane.is_ready()


async def test_polling_runs_by_itself(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}}, control_mode="poll", poll_interval_s=0.02) as rig:
        rig.write("later", {1: {"factor": 9}})
        await eventually(lambda: rig.manager.is_ready("later"))
        assert await rig.infer("later") == 9


async def test_a_repository_that_vanishes_takes_no_model_down(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    async with running(root, {"m": {1: {}}}, control_mode="poll") as rig:
        root.rename(tmp_path / "away")
        with pytest.raises(ModelLoadError, match="repository"):
            await rig.manager.poll()
        assert await rig.infer("m") == 2
        (tmp_path / "away").rename(root)
        await rig.manager.poll()
        assert await rig.infer("m") == 2


async def test_a_start_without_a_repository_says_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="the model repository cannot be read"):
        await rig.manager.start()
    rig.mailbox.close()


# what is asked


@pytest.mark.parametrize("version", ["0", "-1", "1.5", "latest", "\uff11", "9" * 30, " 1"])
async def test_version_strings_that_are_no_versions(tmp_path: Path, version: str) -> None:
    async with running(tmp_path, {"m": {1: {}}}) as rig:
        for ask in (rig.manager.acquire, rig.manager.is_ready, rig.controlplane.model_metadata):
            with pytest.raises(RequestError, match="failed to get model version from specified version string"):
                ask("m", version)


async def test_statistics_of_what_does_not_serve(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}}) as rig:
        with pytest.raises(RequestError, match="requested model 'x' is not available"):
            rig.controlplane.statistics("x")
        with pytest.raises(RequestError, match="requested model version is not available for model 'm'"):
            rig.controlplane.statistics("m", "4")
        await asyncio.gather(*(rig.infer("m", value) for value in range(10)))
        (statistics,) = rig.controlplane.statistics()
        assert (statistics.name, statistics.version) == ("m", "1")
        assert (statistics.inference_count, statistics.success.count) == (10, 10)
        assert 1 <= statistics.execution_count <= 10


async def test_the_completed_configuration_is_served(tmp_path: Path) -> None:
    async with running(tmp_path, {"m": {1: {}}}) as rig:
        config = rig.controlplane.model_config("m").to_dict()
        assert (config["name"], config["backend"], config["max_batch_size"]) == ("m", "scripted", 32)
        assert [(each["name"], each["data_type"], each["dims"]) for each in config["input"]] == [
            ("X", "TYPE_INT32", [1])
        ]
        assert config["instance_group"][0]["count"] == 1
        assert rig.controlplane.server_metadata().name == "aiorchestrator"
        assert "statistics" in rig.controlplane.server_metadata().extensions


async def test_an_observer_that_raises_changes_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write("m", {1: {}})

    def observe(entry: ModelIndexEntry) -> None:
        raise RuntimeError("the display is gone")

    rig.manager._observe = observe
    await rig.manager.start()
    assert await rig.infer("m") == 2
    await rig.manager.stop(DEADLINE_S)
    rig.mailbox.close()
