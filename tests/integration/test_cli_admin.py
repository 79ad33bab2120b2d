"""The commands of the admin API against a scripted server: what they ask, show, and end with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiorch_proto.admin.v1 import deployments_pb2
from scripted_admin import STATUS, Refusal, ScriptedAdmin
from typer.testing import CliRunner

from aiorch_server.cli import build_app, model
from aiorch_server.cli.connection import ClientOutput

APP = build_app()
LIMIT_S = 30


@pytest.fixture
def server() -> Iterator[ScriptedAdmin]:
    scripted = ScriptedAdmin()
    yield scripted
    scripted.close()


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    path = tmp_path / "digits.onnx"
    path.write_bytes(b"onnx" * 1000)
    return path


def run(server: ScriptedAdmin | str, *arguments: object, **options: Any) -> Any:
    url = server if isinstance(server, str) else server.url
    return CliRunner().invoke(APP, [*map(str, arguments), "--url", url], **options)


def run_json(server: ScriptedAdmin | str, *arguments: object, **options: Any) -> tuple[int, Any]:
    result = run(server, *arguments, "--json", **options)
    assert result.output.strip(), result.exception
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def make_rollout(state: str, **fields: Any) -> deployments_pb2.Rollout:
    rollout = deployments_pb2.Rollout(
        id="r1",
        model="digits",
        from_version=1,
        to_version=2,
        state=deployments_pb2.RolloutState.Value(f"ROLLOUT_STATE_{state}"),
        began_by="ann",
        **fields,
    )
    rollout.plan.strategy = deployments_pb2.STRATEGY_CANARY
    for percent in (1, 10, 50):
        rollout.plan.steps.add(percent=percent).bake_time.seconds = 60
    rollout.began_at.FromSeconds(1_700_000_000)
    return rollout


def report(version: int, p99_ms: float) -> deployments_pb2.VersionReport:
    return deployments_pb2.VersionReport(
        version=version, requests=1234, errors=5, p50_ms=1.0, p99_ms=p99_ms, compared=10, agreed=9
    )


def test_push_list_show_alias_delete(server: ScriptedAdmin, artefact: Path) -> None:
    options = ["--alias", "prod", "--metric", "accuracy=0.98", "--label", "team=a", "--data-hash", "sha256:1"]
    code, document = run_json(server, "model", "push", "digits", artefact, *options)
    assert (code, document["version"]["version"], document["version"]["aliases"]) == (0, 1, ["prod"])
    provenance = document["version"]["provenance"]
    assert (provenance["framework"], provenance["metrics"]) == ("onnxruntime", {"accuracy": 0.98})
    assert document["version"]["created_at"].endswith("+00:00")
    assert "digits:2: 5,632 bytes in 1 file\n" in run(server, "model", "push", "digits", artefact).stdout
    code, document = run_json(server, "model", "list")
    assert [(model["name"], model["aliases"]) for model in document["models"]] == [("digits", {"prod": 1})]
    assert "prod=1" in run(server, "model", "list").stdout
    assert "no models that begin with 'x'" in run(server, "model", "list", "x").stdout
    assert [each["version"] for each in run_json(server, "model", "show", "digits")[1]["versions"]] == [2, 1]
    shown = run(server, "model", "show", "digits@prod").stdout
    assert "digits:1" in shown and "model.onnx" in shown and "accuracy=0.98" in shown and "sha256:1" in shown
    assert run_json(server, "model", "show", "digits:2")[1]["version"]["version"] == 2
    assert "digits@prod is version 2" in run(server, "model", "alias", "digits", "prod", 2, "--expected", 1).stdout
    assert server.requests["SetAlias"][0].expected_version == 1
    assert "no more" in run(server, "model", "alias", "digits", "prod", 0).stdout
    refused = run(server, "model", "delete", "digits:1")
    assert (refused.exit_code, "add --yes" in refused.stderr) == (2, True)
    assert run_json(server, "model", "delete", "digits:1", "--yes")[1] == {"deleted": {"model": "digits", "version": 1}}


def test_a_long_upload_is_told_where_there_is_no_terminal(
    server: ScriptedAdmin, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact.write_bytes(bytes(3 << 20))
    assert len(run(server, "model", "push", "digits", artefact).stdout.splitlines()) == 1
    monkeypatch.setattr(model, "_LINE_S", 0.0)
    lines = run(server, "model", "push", "digits", artefact).stdout.splitlines()
    assert lines[0] == "sending digits.onnx: 1,048,576 of 3,147,264 bytes, 33%" and len(lines) > 2
    assert run_json(server, "model", "push", "digits", artefact)[0] == 0


def test_an_upload_that_broke_off_says_how_to_go_on(server: ScriptedAdmin, artefact: Path) -> None:
    server.refusals["UploadVersion"].extend([Refusal(STATUS.UNAVAILABLE, "the disk is full")] * 6)
    result = run(server, "model", "push", "digits", artefact, "--upload-id", "mine")
    assert result.exit_code == 1
    assert "the disk is full; what came stays at the server" in result.stderr
    assert "--upload-id mine" in result.stderr
    server.refusals["UploadVersion"].append(Refusal(STATUS.DATA_LOSS, "another checksum", "CHECKSUM_MISMATCH"))
    assert "push when nothing writes there" in run(server, "model", "push", "digits", artefact).stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("model", "push", "digits", "/no/such"), "'/no/such' cannot be read: No such file"),
        (("model", "push", "digits:1", "x"), "the model's name alone"),
        (("model", "push", "digits", "x", "--metric", "a"), "expected NAME=VALUE"),
        (("model", "push", "digits", "x", "--metric", "a=b"), "'b' is no number"),
        (("model", "push", "digits", "x", "--metric", "a=nan"), "not finite"),
        (("model", "show", "digits:x"), "expected MODEL, MODEL:7 or MODEL@alias"),
        (("model", "show", "digits@"), "expected MODEL"),
        (("model", "delete", "digits@prod", "--yes"), "name the version by its number"),
        (("deploy", "digits:0"), "versions begin with 1"),
        (("deploy", "digits", "--strategy", "green"), "expected one of replace, blue-green, canary, shadow, ab"),
        (("deploy", "digits", "--step", "10"), "--step is for --strategy canary"),
        (("canary", "digits", "--step", "x:1"), "'x' is no number"),
        (("traffic", "digits", "1=50"), "add up to 50 percent"),
        (("traffic", "digits", "a=50"), "is no share"),
        (("access", "grant", "ann", "king"), "expected one of viewer, client, deployer, admin"),
        (("access", "quota", "set", "ann"), "nothing to set"),
        (("audit", "list", "--since", "yesterday"), "expected a time such as"),
        (("audit", "verify", "--known-number", "3"), "come together"),
        (("model", "list", "--token-file", "/no/such"), "/no/such cannot be read"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(server: ScriptedAdmin, arguments: tuple[str, ...], text: str) -> None:
    code, document = run_json(server, *arguments)
    assert (code, document["error"]["code"] in ("USAGE", "INVALID_ARGUMENT")) == (2, True), document
    assert text in document["error"]["text"]
    assert not server.requests["Deploy"]


def test_who_is_not_there_has_no_registry_or_does_not_know_you(server: ScriptedAdmin, tmp_path: Path) -> None:
    assert run_json("127.0.0.1:1", "model", "list")[0] == 3
    without = ScriptedAdmin(without=("ListModels", "Deploy"))
    try:
        code, document = run_json(without, "deploy", "digits")
        assert (code, document["error"]["code"]) == (1, "UNIMPLEMENTED")
        assert "has no registry; start it with --registry" in document["error"]["text"]
    finally:
        without.close()
    server.refusals["ListModels"].append(Refusal(STATUS.UNAUTHENTICATED, "the key is unknown", "NOT_AUTHENTICATED"))
    code, document = run_json(server, "model", "list")
    assert (code, document["error"]["reason"]) == (1, "NOT_AUTHENTICATED")
    assert "--token-file FILE or AIORCH_TOKEN" in document["error"]["text"]
    (tmp_path / "token").write_text("aio_k_file\n")
    run(server, "model", "list", "--token-file", tmp_path / "token", env={"AIORCH_TOKEN": "aio_k_variable"})
    assert server.metadata[-1]["authorization"] == "Bearer aio_k_file"
    run(server, "model", "list", env={"AIORCH_TOKEN": "aio_k_variable"})
    assert server.metadata[-1]["authorization"] == "Bearer aio_k_variable"
    assert "AIORCH_TOKEN holds no token" in run(server, "model", "list", env={"AIORCH_TOKEN": "a\nb"}).stderr


def test_headers(server: Any, tmp_path: Path) -> None:
    """What restricted protocols ask for: by option, file and environment; never told where it is wrong."""
    (tmp_path / "secret").write_text("from-a-file\n")
    given = ("--header", f"X-Key=@{tmp_path}/secret", "--header", "triton-grpc-protocol-admin=a=b")
    for words in (("model", "list"), ("status",)):
        run(server, *words, *given, env={"AIORCH_HEADERS": "x-key=lost\nx-more=1\n"})
        sent = server.metadata[-1]
        assert (sent["x-key"], sent["triton-grpc-protocol-admin"], sent["x-more"]) == ("from-a-file", "a=b", "1")
    for wrong in ("sesame", "=sesame", "a b=sesame", "authorization=sesame", "x-bin=sesame", "grpc-x=sesame", "x=sés"):
        for more in ({"env": {"AIORCH_HEADERS": wrong}}, {}):
            option = () if more else ("--header", wrong)
            refused = run(server, "model", "list", *option, **more)
            assert "NAME=VALUE" in refused.stderr or "printable ASCII" in refused.stderr
            assert "sesame" not in refused.stderr
    assert "cannot be read" in run(server, "model", "list", "--header", "x=@/no/such").stderr


def test_wrong_names_are_told_with_those_that_are_alike(server: ScriptedAdmin, artefact: Path) -> None:
    for name in ("digits", "sentences"):
        run(server, "model", "push", name, artefact, "--alias", "production")
    for command in (("model", "show"), ("deploy",), ("promote",), ("undeploy",), ("status",)):
        server.refusals["Promote"].append(Refusal(STATUS.NOT_FOUND, "model 'digit' is not registered"))
        result = run(server, *command, "digit")
        assert (result.exit_code, "did you mean 'digits'?" in result.stderr) == (1, True), (command, result.output)
    assert "no such version; the latest is 1\n" in run(server, "model", "show", "digits:9").stderr
    server.refusals["GetVersion"].append(Refusal(STATUS.NOT_FOUND, "no alias 'prodution'"))
    assert "did you mean 'production'?" in run(server, "model", "show", "digits@prodution").stderr


def test_deploy_asks_for_what_was_said(server: ScriptedAdmin, artefact: Path) -> None:
    run(server, "model", "push", "digits", artefact, "--alias", "prod")
    gates = ["--max-error-rate", "0", "--max-p99-ratio", "2", "--min-agreement", "0.9", "--atol", "0.1"]
    steps = ["--step", "5:0.5", "--step", "50:2s", "--step", "70", "--bake-secs", "3"]
    options = ["--strategy", "canary", "--instances", "2", "--expected-generation", "4", "--manual-rollback"]
    code, document = run_json(server, "deploy", "digits@prod", *options, *gates, *steps)
    assert (code, document["deployment"]["version"], document["deployment"]["state"]) == (0, 1, "ready")
    request = server.requests["Deploy"][0]
    assert (request.alias, request.version, request.instances, request.expected_generation) == ("prod", 0, 2, 4)
    plan = request.plan
    assert plan.strategy == deployments_pb2.STRATEGY_CANARY and plan.manual_rollback
    assert [(step.percent, step.bake_time.ToMilliseconds()) for step in plan.steps] == [
        (5, 500),
        (50, 2000),
        (70, 3000),
    ]
    assert plan.gates.max_error_rate < 0 and plan.gates.max_p99_ratio == 2 and plan.gates.agreement_atol == 0.1
    run(server, "canary", "digits")
    plan = server.requests["Deploy"][1].plan
    assert (plan.gates.max_error_rate, plan.gates.max_p99_ratio, len(plan.steps)) == (0.01, 1.5, 0)
    assert "digits" in run(server, "status", "digits").stdout
    assert run_json(server, "scale", "digits", 3)[1]["deployment"]["instances"] == 3
    code, document = run_json(server, "traffic", "digits", "1=99.5", "2=0.5%")
    assert [each["percent"] for each in document["deployment"]["traffic"]] == [99.5, 0.5]
    assert "1=99.5% 2=0.5%" in run(server, "status", "digits").stdout
    assert run_json(server, "undeploy", "digits") == (0, {"undeployed": "digits"})


def test_waiting_shows_the_way_and_ends_as_the_rollout_does(server: ScriptedAdmin, artefact: Path) -> None:
    run(server, "model", "push", "digits", artefact)
    reports = [report(1, 2.0), report(2, 9.0)]
    reason = "p99 is 4.5 times that of version 1, at most 1.5 is allowed"
    ended = make_rollout("ROLLED_BACK", reason=reason, reports=reports, disagreements=["label: 3 and 8"])
    way = [make_rollout("PENDING"), make_rollout("RUNNING", step=1, reports=reports), ended]
    server.rollouts.extend(way)
    result = run(server, "deploy", "digits", "--strategy", "canary", "--wait")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "digits 1 -> 2 by canary: pending, step 1 of 3: 1 % to version 2"
    assert "digits 1 -> 2 by canary: running, step 2 of 3: 10 % to version 2" in lines
    assert "9.000" in result.stdout and "90.00%" in result.stdout and "label: 3 and 8" in result.stdout
    assert f"version 2 of digits was not rolled out: rolled-back, {reason}" in result.stderr
    server.rollouts.clear()
    server.rollouts.extend(way)
    code, document = run_json(server, "deploy", "digits", "--wait")
    assert (code, document["error"]["code"]) == (1, "ROLLED_BACK")
    server.rollouts.clear()
    server.rollouts.extend((make_rollout("RUNNING"), make_rollout("SUCCEEDED")))
    code, document = run_json(server, "canary", "digits", "--wait")
    assert (code, document["rollout"]["state"], document["rollout"]["reports"]) == (0, "succeeded", [])
    code, document = run_json(server, "deploy", "digits", "--wait")  # nothing is under way: until it is ready
    assert (code, document["deployment"]["state"]) == (0, "ready")
    server.rollouts[0].state = deployments_pb2.ROLLOUT_STATE_RUNNING
    result = run(server, "deploy", "digits", "--wait", "--wait-secs", "1")
    assert result.exit_code == 1
    assert "has not ended within 1 s" in result.stderr
    assert f"aiorch abort digits --url {server.url} goes back" in result.stderr


def test_waiting_ends_where_only_a_person_can_go_on(server: ScriptedAdmin, artefact: Path) -> None:
    run(server, "model", "push", "digits", artefact)
    server.rollouts.extend((make_rollout("RUNNING"), make_rollout("PAUSED", reason="ann: pause")))
    result = run(server, "canary", "digits", "--wait", "--wait-secs", "20")
    assert result.exit_code == 1 and "was not rolled out: paused, ann: pause" in result.stderr
    assert f"aiorch resume digits --url {server.url} or aiorch promote" in " ".join(result.stdout.split())
    server.rollouts.clear()
    endless = make_rollout("RUNNING")
    endless.plan.strategy = deployments_pb2.STRATEGY_AB
    server.rollouts.extend((make_rollout("LOADING"), endless))
    result = run(server, "deploy", "digits", "--wait", "--wait-secs", "20")
    assert result.exit_code == 0 and "until somebody decides: aiorch promote" in result.stdout, result.output


def test_times_of_a_strategy_without_steps(server: ScriptedAdmin, artefact: Path) -> None:
    run(server, "model", "push", "digits", artefact)
    assert run(server, "deploy", "digits", "--strategy", "blue-green", "--bake-secs", "5").exit_code == 0
    plan = server.requests["Deploy"][0].plan
    assert (plan.bake_time.seconds, len(plan.steps)) == (5, 0)


def test_commands_that_are_told_find_the_same_server(tmp_path: Path) -> None:
    way = {"url": "[::1]:9", "tls": True, "tls_root_cert": tmp_path / "a b", "tls_key": None, "timeout_secs": 3.0}
    output = ClientOutput(False, {**way, "token_file": Path("t"), "json": False})
    told = output.write_command("status", "digits")
    assert shlex.split(told) == [
        *("aiorch", "status", "digits", "--url", "[::1]:9", "--tls", "--tls-root-cert", f"{tmp_path}/a b"),
        *("--token-file", "t"),
    ]
    assert ClientOutput(False, {"url": "127.0.0.1:8001"}).write_command("history") == "aiorch history"


def test_waiting_for_a_rollback(server: ScriptedAdmin) -> None:
    server.rollouts.extend((make_rollout("ROLLING_BACK"), make_rollout("ROLLED_BACK", reason="ann: rollback")))
    result = run(server, "rollback", "digits", "--wait")
    assert (result.exit_code, result.stdout.count("rolled-back, ann: rollback")) == (0, 1), result.output
    server.rollouts.clear()
    server.rollouts.extend((make_rollout("LOADING"), make_rollout("SUCCEEDED")))
    assert run(server, "rollback", "digits", "--wait").exit_code == 0  # nothing was under way: what served before
    server.rollouts.clear()
    server.rollouts.extend((make_rollout("LOADING"), make_rollout("FAILED", reason="its file is gone")))
    assert "its file is gone" in run(server, "rollback", "digits", "--wait").stderr


def test_the_history_of_all_models(server: ScriptedAdmin, artefact: Path) -> None:
    """The call is for one model: more of them are put together here, the newest first."""
    assert run_json(server, "history") == (0, {"rollouts": []})
    assert f"aiorch model push MODEL PATH --url {server.url} makes one" in run(server, "model", "list").stdout
    for name in ("digits", "letters"):
        run(server, "model", "push", name, artefact)
    server.rollouts.extend((make_rollout("SUCCEEDED"), make_rollout("ABORTED")))
    server.rollouts[0].began_at.FromSeconds(1_600_000_000)
    found = run_json(server, "history", "--limit", 3)[1]["rollouts"]
    assert [each["state"] for each in found] == ["aborted", "aborted", "succeeded"]
    assert {each.model for each in server.requests["ListRollouts"]} == {"digits", "letters"}


def test_steering_a_rollout(server: ScriptedAdmin) -> None:
    server.rollouts.append(make_rollout("PAUSED", reason="by ann"))
    for command in ("promote", "rollback", "pause", "resume", "abort"):
        code, document = run_json(server, command, "digits")
        assert (code, document["rollout"]["id"], document["rollout"]["state"]) == (0, "r1", "paused")
    run(server, "abort", "digits", "--reason", "no good")
    assert server.requests["Abort"][-1].reason == "no good"
    assert "paused" in run(server, "history", "digits").stdout
    assert run_json(server, "history", "digits")[1]["rollouts"][0]["plan"]["strategy"] == "canary"
    server.rollouts.clear()
    code, document = run_json(server, "promote", "digits")
    assert (code, document["error"]["reason"]) == (1, "PRECONDITION_FAILED")


def test_watching(server: ScriptedAdmin) -> None:
    events = [deployments_pb2.Event(number=n, kind="rollout.step", model="digits", text=f"[b]{n}") for n in (4, 7)]
    server.watches.extend([(events, None), (events, None), ([], Refusal(STATUS.PERMISSION_DENIED, "not you"))])
    result = run(server, "watch", "digits", "--after", 3, "--limit", 2, "--json")
    assert [json.loads(line)["number"] for line in result.stdout.splitlines()] == [4, 7]
    assert server.requests["WatchEvents"][0].after == 3
    assert "[b]7" in run(server, "watch", "--limit", 2).stdout, "texts are no markup"
    assert run_json(server, "watch")[0] == 1


def test_access_and_audit(server: ScriptedAdmin) -> None:
    assert "deployer on team-*" in run(server, "access", "whoami").stdout
    code, document = run_json(server, "access", "grant", "bob", "viewer", "--models", "digits")
    assert (code, document["binding"]["role"]) == (0, "viewer")
    assert run_json(server, "access", "bindings")[1]["bindings"][0]["id"] == "b1"
    assert run_json(server, "access", "revoke", "b1") == (0, {"revoked": "b1"})
    made = run(server, "access", "key", "create", "bob", "--expires-days", "30")
    assert made.stdout.splitlines()[-1] == "aio_k123_hush"
    assert server.requests["CreateApiKey"][0].HasField("expires_at")
    assert run_json(server, "access", "key", "create", "bob")[1]["secret"] == "aio_k123_hush"
    assert "hush" not in run(server, "access", "key", "list").output
    assert run_json(server, "access", "key", "revoke", "k123")[0] == 0
    assert run_json(server, "access", "quota", "set", "ann", "--rows-per-s", "2")[1]["quotas"][0]["rows_per_s"] == 2
    assert "ann" in run(server, "access", "quota", "list").stdout
    assert run_json(server, "audit", "list", "--since", "2026-01-31")[1]["entries"][0]["number"] == 7
    assert "unbroken" in run(server, "audit", "verify").stdout
    broken = run(server, "audit", "verify", "--known-number", "3", "--known-hash", "bad")
    assert broken.exit_code == 1
    assert "the audit log is broken at entry 3: entry 3 was changed" in broken.stderr


def test_objectives(server: ScriptedAdmin) -> None:
    code, document = run_json(server, "objective", "set", "digits", "--p99", "50ms", "--max-instances", "4")
    assert (code, document["objective"]["percentile"], document["objective"]["latency_us"]) == (0, 99.0, 50_000)
    assert list(server.requests["SetObjective"][0].update_mask.paths) == ["percentile", "latency_us", "max_instances"]
    run(server, "objective", "set", "digits", "--percentile", "99.9", "--latency", "0.2s", "--error-budget", "0.1%")
    run(server, "objective", "set", "digits", "--priority", "-1")
    shown = run(server, "objective", "show", "digits").stdout
    for part in ("99.9 % of requests within 200 ms", "0.1 %", "at most 4", "priority", "-1"):
        assert part in shown, shown
    assert run_json(server, "objective", "show", "digits")[1]["objective"]["error_budget"] == 0.001
    explained = run(server, "explain", "digits").stdout
    assert "instances" in explained and "1 -> 2" in explained and "p99 was 61 ms" in explained
    text = "this server has no optimizer: nothing moves the knobs"
    server.refusals["Explain"].extend([Refusal(STATUS.UNIMPLEMENTED, text, "UNSUPPORTED_REQUEST")] * 2)
    code, document = run_json(server, "explain", "digits")
    assert (code, document["error"]["text"], document["error"]["code"]) == (1, text, "UNIMPLEMENTED")
    assert "registry" not in run(server, "explain", "digits").stderr
    missing = run(server, "objective", "show", "other")
    command = f"aiorch objective set other --p99 50ms --url {server.url} gives it one"
    assert missing.exit_code == 1 and command in missing.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "nothing to set"),
        (("--p99", "50"), "--p99 50: expected a time with its unit, such as 50ms, 500us or 1.5s"),
        (("--p99", "fast"), "--p99 fast: expected a time"),
        (("--p99", "-5ms"), "expected a time"),
        (("--p99", "infs"), "expected a time"),
        (("--p99", "0.1us"), "a microsecond or more"),
        (("--p99", "5ms", "--p95", "2ms"), "--p95 and --p99: a model has one latency objective"),
        (("--p99", "5ms", "--latency", "2ms"), "one latency objective"),
        (("--error-budget", "150%"), "--error-budget 150%: expected a part of the requests, such as 0.001 or 0.1%"),
        (("--error-budget", "x"), "expected a part"),
    ],
)
def test_a_wrong_objective_is_told(server: ScriptedAdmin, options: tuple[str, ...], text: str) -> None:
    code, document = run_json(server, "objective", "set", "digits", *options)
    assert code == 2 and text in document["error"]["text"], document
    assert not server.requests["SetObjective"]


def test_a_watch_ends_as_interrupted(server: ScriptedAdmin) -> None:
    command = [sys.executable, "-m", "aiorch_server.cli", "watch", "--url", server.url]
    watching = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not server.requests["WatchEvents"]:
            assert time.monotonic() < deadline and watching.poll() is None
            time.sleep(0.02)
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=LIMIT_S)
    finally:
        watching.kill()
        watching.wait(LIMIT_S)
    assert (watching.returncode, out, b"Traceback" in err) == (130, b"", False), err


def test_a_process_that_is_interrupted_leaves_the_rollout_running(server: ScriptedAdmin, artefact: Path) -> None:
    """Also: the command as its own process pushes and waits."""
    command = [sys.executable, "-m", "aiorch_server.cli"]
    pushed = subprocess.run(
        [*command, "model", "push", "digits", artefact, "--url", server.url, "--json"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["version"]["model"] == "digits"
    server.rollouts.append(make_rollout("RUNNING"))
    waiting = subprocess.Popen(
        [*command, "deploy", "digits", "--wait", "--url", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # a shell's background jobs, and so their children, begin with it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not server.requests["GetRollout"]:
            assert time.monotonic() < deadline and waiting.poll() is None
            time.sleep(0.02)
        waiting.send_signal(signal.SIGINT)
        _, err = waiting.communicate(timeout=LIMIT_S)
    finally:
        waiting.kill()
        waiting.communicate(timeout=LIMIT_S)  # closes its pipes: open ones would be counted against the next test
    assert waiting.returncode == 130, err
    assert f"interrupted; rollout r1 goes on: aiorch status digits --url {server.url} shows it" in err
    assert "Traceback" not in err
    assert not server.requests["Abort"]
