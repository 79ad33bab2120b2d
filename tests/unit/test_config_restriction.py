"""Restrictions as they are written: what is wrong is told, and never the value."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from aiorch_server.cli.output import UsageError
from aiorch_server.cli.settings import build_config
from aiorch_server.config.load import load_server_config
from aiorch_server.config.restriction import Group, Restriction
from aiorch_server.config.server import HttpConfig, ServerConfig
from aiorch_server.errors import InvalidSettings
from aiorch_server.frontends.restriction import AccessRules

SECRET = "Xyzzy"
FIELDS = {"grpc_restricted_protocol": "grpc.restricted_protocols", "http_restricted_api": "http.restricted_apis"}


def show(restrictions: tuple[Restriction, ...]) -> list[tuple[tuple[str, ...], str, str]]:
    return [(tuple(each.groups), each.key, each.value.get_secret_value()) for each in restrictions]


def test_forms_that_are_right(tmp_path: Path) -> None:
    first, second = "health, metadata:k1=a,b:c=d e", "inference:k2=x"
    expected = [(("health", "metadata"), "k1", "a,b:c=d e"), (("inference",), "k2", "x")]
    file = tmp_path / "server.yaml"
    file.write_text(f"grpc: {{restricted_protocols: ['{first}', '{second}']}}\nhttp: {{restricted_apis: '{second}'}}\n")
    environment = {"AIORCH_GRPC_RESTRICTED_PROTOCOL": f"{first}\n{second}\n"}
    for config in (
        load_server_config({"grpc_restricted_protocol": [first, second]}, environment={}),
        load_server_config(environment=environment),
        load_server_config(file=file, environment={}),
    ):
        assert show(config.grpc.restricted_protocols) == expected
    assert show(load_server_config(file=file, environment={}).http.restricted_apis) == expected[1:]
    command = build_config(
        {"model_repository": [str(tmp_path)]},
        file=None,
        use_ssl=None,
        log_verbose=None,
        backend_config=[],
        others=[f"grpc_restricted_protocol={first}"],
    )
    assert show(command.grpc.restricted_protocols) == expected[:1]
    # what was made is taken as it is
    assert ServerConfig(grpc={"restricted_protocols": command.grpc.restricted_protocols}) is not None


WRONG = {
    SECRET: "should be written GROUP,GROUP...:KEY=VALUE, for example ",
    f"inference:{SECRET}": "should be written",
    f"inference={SECRET}": "should be written",
    f"inference;k={SECRET}": "should be written",
    f":k={SECRET}": "should be written",
    f" :k={SECRET}": "should be written",
    f"inference:={SECRET}": "KEY is 1 to 100 letters",
    f"inference:a b={SECRET}": "KEY is",
    f"inference:k:{SECRET}=x": "KEY is",
    f"inference:kä={SECRET}": "KEY is",
    f"inference:{'k' * 101}={SECRET}": "KEY is",
    "inference:k=": "VALUE is 1 to 512 printable ASCII characters",
    f"inference:k= {SECRET}": "VALUE is",
    f"inference:k={SECRET}\t": "VALUE is",
    f"inference:k={SECRET}ä": "VALUE is",
    f"inference:k={SECRET}\0": "VALUE is",
    f"inference:k={SECRET}{'x' * 512}": "VALUE is",
    f"model-reposit,health:k={SECRET}": "there is no group 'model-reposit', groups are health, metadata, inference, ",
    f"Inference:k={SECRET}": "there is no group 'Inference'",
    f"inference,,health:k={SECRET}": "there is no group, groups are",
    f"inference,:k={SECRET}": "there is no group, groups are",
    f"a={SECRET},b:k=v": "there is no group, groups are",
    f"inference,inference:k={SECRET}": "has group 'inference' again; a group has one header",
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("written", WRONG)
def test_forms_that_are_wrong(field: str, written: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings) as raised:
        load_server_config({field: [written]}, environment={})
    text = str(raised.value)
    assert WRONG[written] in text and f"{FIELDS[field]}[0]" in text and f"--{field.replace('_', '-')}" in text
    assert SECRET not in text and SECRET not in repr(raised.value.__context__)


@pytest.mark.parametrize("field", FIELDS)
def test_a_group_has_one_restriction(field: str) -> None:
    with pytest.raises(InvalidSettings, match=r"\[1\]: has group 'health' again") as raised:
        load_server_config({field: [f"metadata,health:k={SECRET}", f"health:j={SECRET}"]}, environment={})
    assert SECRET not in str(raised.value)


def test_a_binary_key_is_refused_for_grpc_only() -> None:
    with pytest.raises(InvalidSettings, match="ends in '-bin'") as raised:
        load_server_config({"grpc_restricted_protocol": [f"health:k-BIN={SECRET}"]}, environment={})
    assert SECRET not in str(raised.value)
    assert load_server_config({"http_restricted_api": ["health:k-bin=v"]}, environment={}).http.restricted_apis


@pytest.mark.parametrize("written", [f"{{k: {SECRET}}}", f"[{{groups: [health], key: k, value: {SECRET}}}]", "[7]"])
def test_values_of_a_wrong_kind_are_not_shown(written: str, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(f"http: {{restricted_apis: {written}}}\n")
    with pytest.raises(InvalidSettings) as raised:
        load_server_config(file=file, environment={})
    assert "http.restricted_apis" in str(raised.value) and SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "http: health:k=@",
        "http: [health:k=@]",
        "http: {restricted_apis: [health:k=@",
        "http: {restricted_apis: {health: {k: @}}}",
        "http_restricted_api: health:k=@",
        "http: {restricted_apis: [a:k=@], restricted_apis: 1}",
        "health:k=@",
    ],
)
def test_files_that_are_wrong_are_told_without_the_value(name: str, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(name.replace("@", SECRET))
    with pytest.raises(InvalidSettings) as raised:
        load_server_config(file=file, environment={})
    assert "server.yaml" in str(raised.value) and SECRET not in str(raised.value)


def test_two_sources_on_one_command_line_are_told_without_the_value(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        build_config(
            {"model_repository": [str(tmp_path)], "http_restricted_api": [f"health:k={SECRET}"]},
            file=None,
            use_ssl=None,
            log_verbose=None,
            backend_config=[],
            others=[f"http.restricted_apis=health:k={SECRET}2"],
        )
    assert "given twice" in str(raised.value) and SECRET not in str(raised.value)


def test_the_value_is_in_no_text_of_the_configuration() -> None:
    config = ServerConfig(http={"restricted_apis": [f"health:k={SECRET}"]})
    rules = AccessRules(config.http.restricted_apis)
    for text in (repr(config), str(config), config.model_dump_json(), str(config.model_dump()), repr(rules)):
        assert SECRET not in text
    with pytest.raises(ValidationError) as raised:
        HttpConfig(restricted_apis=[f"health:k={SECRET}", f"health:k={SECRET}"])
    assert SECRET not in str(raised.value)
    with pytest.raises(ValidationError) as raised:
        ServerConfig(http={"restricted_apis": [f"healthy:k={SECRET}"]})
    assert SECRET not in str(raised.value)
    assert SECRET not in repr(pickle.loads(pickle.dumps(config)))


def test_the_rule() -> None:
    written = ["health,trace:Key=Right"]
    rules = AccessRules(HttpConfig(restricted_apis=written).restricted_apis)
    right, wrong = (b"key", b"Right"), (b"key", b"right")
    for headers in ([right], [right, right], [(b"other", b"Right"), right]):
        assert rules.find_refusal([Group.TRACE], headers) is None
    for headers in ([], [wrong], [right, wrong], [wrong, right], [(b"key", b"")], [(b"key", b"\xff")]):
        refusal = rules.find_refusal([Group.HEALTH], headers)
        assert str(refusal) == "This API is restricted, expecting header 'Key'"
        assert rules.find_refusal([Group.INFERENCE], headers) is None
        assert rules.find_refusal([Group.INFERENCE, Group.HEALTH], headers) is not None
    assert rules.is_open([Group.INFERENCE]) and not rules.is_open([Group.INFERENCE, Group.TRACE])
    assert AccessRules().find_refusal(Group, []) is None
