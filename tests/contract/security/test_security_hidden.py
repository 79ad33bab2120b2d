"""A model on which a caller has no role is answered exactly as one that does not exist."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import httpx
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from running_site import encode_values
from secured import DOORS, SERVICE, Answer, Secured, serve_secured

from aiorch_server.security import TABLE, Scope

from .test_security_calls import ask_route, list_routes, list_rpcs, make_message

#: Of one length, so that texts can be compared letter by letter.
HIDDEN, MISSING = "other-one", "other-two"


def same(answer: Answer, name: str) -> tuple[str, str, bytes]:
    return answer.code, answer.text.replace(name, "?"), answer.data.replace(name.encode(), b"?")


@pytest.mark.parametrize("caller", ["nothing", "viewer", "admin"])
@pytest.mark.parametrize("door", DOORS)
async def test_over_grpc(models: Path, door: str, caller: str) -> None:
    async with serve_secured(models, door) as site:
        for path in list_rpcs():
            if TABLE[path].scope is Scope.MODEL:
                hidden = same(await site.call(path, make_message(path, HIDDEN), caller), HIDDEN)
                missing = same(await site.call(path, make_message(path, MISSING), caller), MISSING)
                assert hidden == missing, path
                if not path.endswith(("Index", "MultiInference", "Unload")):
                    known = same(await site.call(path, make_message(path, HIDDEN), "root"), HIDDEN)
                    assert known != hidden, f"{path} tells nothing to those who may know either"


@pytest.mark.parametrize("version", ["", "1", "9", "x"])
async def test_with_versions(models: Path, version: str) -> None:
    async with serve_secured(models) as site:
        for name in ("ModelMetadata", "ModelConfig", "ModelReady", "ModelStatistics"):
            message = {each: getattr(pb, f"{name}Request")(name=each, version=version) for each in (HIDDEN, MISSING)}
            answers = [
                same(await site.call(f"{SERVICE}/{name}", each.SerializeToString(), "client"), model)
                for model, each in message.items()
            ]
            assert answers[0] == answers[1], name
        for name in ("ModelInfer", "ModelStreamInfer"):
            answers = [
                same(await site.call(f"{SERVICE}/{name}", encode_values([1.0], each, version), "client"), each)
                for each in (HIDDEN, MISSING)
            ]
            assert answers[0] == answers[1], name


@pytest.mark.parametrize("caller", ["nothing", "viewer", "admin"])
async def test_over_rest(models: Path, caller: str) -> None:
    async with serve_secured(models) as site:
        for call, _ in list_routes():
            if TABLE[call].scope is Scope.MODEL:
                hidden = await ask_route(site, call, caller, HIDDEN)
                missing = await ask_route(site, call, caller, MISSING)
                assert (hidden[0], hidden[1].replace(HIDDEN, MISSING)) == missing, call


def names(index: pb.RepositoryIndexResponse) -> set[str]:
    return {each.name for each in index.models}


@pytest.mark.parametrize(
    ("caller", "seen"), [("nothing", set()), ("viewer", {"own-one"}), ("root", {"own-one", "other-one"})]
)
async def test_lists_leave_out_what_is_not_seen(models: Path, caller: str, seen: set[str]) -> None:
    async with serve_secured(models) as site:
        index = await site.call(f"{SERVICE}/RepositoryIndex", b"", caller)
        assert names(pb.RepositoryIndexResponse.FromString(index.data)) == seen
        counts = await site.call(f"{SERVICE}/ModelStatistics", b"", caller)
        assert {each.name for each in pb.ModelStatisticsResponse.FromString(counts.data).model_stats} == seen
        listed: httpx.Response = await site.ask("POST", "/v2/repository/index", caller)
        assert {each["name"] for each in listed.json()} == seen
        counted = await site.ask("GET", "/v2/models/stats", caller)
        assert {each["name"] for each in counted.json()["model_stats"]} == seen


async def test_readiness_names_nobody(models: Path, tmp_path: Path) -> None:
    """Who may ask without credentials is not told which models are not ready."""
    (tmp_path / "broken" / "1").mkdir(parents=True)
    (tmp_path / "broken" / "config.pbtxt").write_text('backend: "nowhere"')
    async with serve_secured(tmp_path) as site:
        answer = await site.ask("GET", "/v2/health/ready")
        assert (answer.status_code, answer.content) == (400, b"")


async def measure(site: Secured, path: str, model: str) -> float:
    message = make_message(path, model)
    begin = time.perf_counter()
    await site.call(path, message, "client")
    return time.perf_counter() - begin


@pytest.mark.alone
async def test_in_the_same_time(models: Path) -> None:
    """The medians of many calls by turns lie no further apart than those of the same call do."""
    async with serve_secured(models) as site:
        path = f"{SERVICE}/ModelInfer"
        times: dict[str, list[float]] = {HIDDEN: [], MISSING: []}
        for _ in range(300):
            for model, taken in times.items():
                taken.append(await measure(site, path, model))
        hidden, missing = (statistics.median(each) for each in times.values())
        assert abs(hidden - missing) < 0.35 * min(hidden, missing)
