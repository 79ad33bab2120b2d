"""Models, versions, aliases, objectives and uploads on each kind of database."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from registry_values import add_version, make_deployment, make_manifest, make_rollout

from aiorch_server.errors import (
    AlreadyExists,
    Conflict,
    NotFoundError,
    PreconditionFailed,
    RequestError,
    UnknownVersion,
)
from aiorch_server.registry import models, objectives, upload_rows, versions
from aiorch_server.registry.columns import LARGEST_DOCUMENT_BYTES
from aiorch_server.registry.database import Database
from aiorch_server.registry.deployments import put_deployment, withdraw
from aiorch_server.registry.records import Provenance, RolloutState, TensorSignature
from aiorch_server.registry.rollouts import begin_rollout, put_rollout

SQL = ["digits'; DROP TABLE models; --", "dig%", "dig_ts\\", '"digits"', "di*", "digits ", "\0", "\ud800", "é" * 300]


def test_a_model_and_its_ways(database: Database) -> None:
    before = datetime.now(UTC) - timedelta(minutes=5)
    run = database.run_blocking
    made = run(
        lambda s: models.register(s, "digits", actor="al", description="Ziffern: 数字 🎲", labels={"team": "a'%\\"})
    )
    assert (made.name, made.created_by, made.latest_version, dict(made.aliases)) == ("digits", "al", 0, {})
    assert before < made.created_at < before + timedelta(minutes=10) and made.created_at.tzinfo is UTC
    found = database.read_blocking(lambda s: models.get(s, "digits"))
    assert found == made and found.description == "Ziffern: 数字 🎲" and found.labels == {"team": "a'%\\"}
    changed = run(lambda s: models.update_model(s, "digits", description="new"))
    assert changed.description == "new" and changed.labels == made.labels and changed.etag != made.etag
    with pytest.raises(AlreadyExists, match="model 'digits' is registered already"):
        run(lambda s: models.register(s, "digits", actor="bo"))
    run(lambda s: models.delete_model(s, "digits"))
    with pytest.raises(NotFoundError, match="model 'digits' is not registered"):
        database.read_blocking(lambda s: models.get(s, "digits"))


def test_names_are_compared_byte_by_byte(database: Database) -> None:
    for name in ("digits", "Digits", "DIGITS"):
        database.run_blocking(lambda s, name=name: models.register(s, name, actor="al"))
    listed = database.read_blocking(models.list_models)
    assert [each.name for each in listed.items] == ["DIGITS", "Digits", "digits"]
    only = database.read_blocking(lambda s: models.list_models(s, name_prefix="Dig"))
    assert [each.name for each in only.items] == ["Digits"]


@pytest.mark.parametrize("text", SQL)
def test_strange_text_finds_and_breaks_nothing(database: Database, text: str) -> None:
    database.run_blocking(lambda s: models.register(s, "digits", actor="al"))
    for call in (lambda s: models.register(s, text, actor="al"), lambda s: models.set_alias(s, "digits", text, 1)):
        with pytest.raises(RequestError, match=r"as (a model's name|an alias); it should be"):
            database.run_blocking(call)
    with pytest.raises(NotFoundError, match="is not registered"):
        database.read_blocking(lambda s: models.get(s, text))
    if text.isprintable() and len(text) < 255:
        assert database.read_blocking(lambda s: models.list_models(s, name_prefix=text)).items == ()
    assert [each.name for each in database.read_blocking(models.list_models).items] == ["digits"]


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a" * 256, "ü", "a\n"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(RequestError, match="should be 1 to 255 of the characters"):
        models.check_model_name(name)


def test_versions_are_numbered_once_and_for_all(database: Database) -> None:
    run = database.run_blocking
    provenance = Provenance(
        framework="onnxruntime",
        inputs=(TensorSignature("x", "FP32", (-1, 64)),),
        metrics={"accuracy": 0.1 + 0.2},
        labels={"run": "7"},
        description="über",
    )
    first = run(
        lambda s: versions.add_version(
            s, "digits", make_manifest(3), provenance, actor="al", create_model=True, point_aliases=["prod"]
        )
    )
    assert (first.version, first.aliases, first.provenance) == (1, ("prod",), provenance)
    assert first.manifest == make_manifest(3)
    second = add_version(database, "digits", make_manifest(3))
    assert second.version == 2 and second.manifest == first.manifest
    run(lambda s: versions.delete_version(s, "digits", 2))
    assert add_version(database, "digits").version == 3
    assert [each.version for each in run(lambda s: versions.list_versions(s, "digits")).items] == [3, 1]
    with pytest.raises(UnknownVersion, match="model 'digits' has no version 2"):
        run(lambda s: versions.get_version(s, "digits", 2))
    with pytest.raises(PreconditionFailed, match="model 'digits' has 2 versions: delete them first"):
        run(lambda s: models.delete_model(s, "digits"))
    run(lambda s: models.set_alias(s, "digits", "prod", 0))
    for version in (1, 3):
        run(lambda s, version=version: versions.delete_version(s, "digits", version))
    run(lambda s: models.delete_model(s, "digits"))
    run(lambda s: models.register(s, "digits", actor="al"))
    assert add_version(database, "digits").version == 4


def test_a_version_with_many_files_ends_its_page(database: Database) -> None:
    for _ in range(3):
        add_version(database, "digits", make_manifest(9_000))
    first = database.read_blocking(lambda s: versions.list_versions(s, "digits"))
    assert [(each.version, len(each.manifest.files)) for each in first.items] == [(3, 9_000), (2, 9_000)]
    second = database.read_blocking(lambda s: versions.list_versions(s, "digits", token=first.token))
    assert [each.version for each in second.items] == [1] and not second.token


def test_what_a_version_is_used_for_keeps_it(database: Database) -> None:
    run = database.run_blocking
    for _ in range(4):
        add_version(database, "digits")

    def refuses(version: int, reason: str) -> None:
        with pytest.raises(PreconditionFailed, match=reason):
            run(lambda s: versions.delete_version(s, "digits", version))

    run(lambda s: models.set_alias(s, "digits", "prod", 1))
    refuses(1, "alias prod of model 'digits' points at version 1")
    run(lambda s: put_deployment(s, replace(make_deployment("digits", 2), previous_version=3), actor="al"))
    refuses(2, "the deployment of model 'digits' uses version 2")
    refuses(3, "what a rollback of model 'digits' goes back to")
    rollout = run(lambda s: begin_rollout(s, make_rollout("digits", to_version=4)))
    refuses(4, f"rollout {rollout.id} of model 'digits' uses version 4")
    with pytest.raises(PreconditionFailed):
        run(lambda s: models.delete_model(s, "digits"))
    run(lambda s: put_rollout(s, replace(rollout, state=RolloutState.ABORTED)))
    run(lambda s: withdraw(s, "digits"))
    for version in (2, 3, 4):
        run(lambda s, version=version: versions.delete_version(s, "digits", version))


def test_blobs_are_referenced_as_long_as_a_version_has_them(database: Database) -> None:
    manifest = make_manifest(2_000)
    blobs = {each.sha256 for each in manifest.files}
    for _ in range(2):
        add_version(database, "digits", manifest)
    for version in (1, 2):
        assert database.read_blocking(lambda s: versions.find_referenced(s, [*blobs, "0" * 64])) == blobs
        database.run_blocking(lambda s, version=version: versions.delete_version(s, "digits", version))
    assert database.read_blocking(lambda s: versions.find_referenced(s, blobs)) == frozenset()


def test_aliases(database: Database) -> None:
    run = database.run_blocking
    for _ in range(2):
        add_version(database, "digits")
    assert run(lambda s: models.set_alias(s, "digits", "prod", 1)).aliases == {"prod": 1}
    resolved = [
        run(lambda s, given=given: models.resolve_version(s, "digits", **given))
        for given in ({}, {"version": 1}, {"alias": "prod"})
    ]
    assert resolved == [2, 1, 1]
    with pytest.raises(Conflict, match="alias 'prod' of model 'digits' points at version 1 by now, not at version 2"):
        run(lambda s: models.set_alias(s, "digits", "prod", 2, expected_version=2))
    with pytest.raises(Conflict, match="does not exist by now"):
        run(lambda s: models.set_alias(s, "digits", "test", 2, expected_version=2))
    assert run(lambda s: models.set_alias(s, "digits", "prod", 2, expected_version=1)).aliases == {"prod": 2}
    with pytest.raises(UnknownVersion):
        run(lambda s: models.set_alias(s, "digits", "prod", 3))
    with pytest.raises(NotFoundError, match="has no alias 'test'"):
        run(lambda s: models.resolve_version(s, "digits", alias="test"))
    with pytest.raises(RequestError, match="not by both"):
        run(lambda s: models.resolve_version(s, "digits", alias="prod", version=1))
    assert run(lambda s: models.set_alias(s, "digits", "prod", 0)).aliases == {}


@pytest.mark.parametrize(
    ("provenance", "text"),
    [
        (Provenance(metrics={"loss": float("nan")}), "metric 'loss' is nan; it should be a finite number"),
        (Provenance(metrics={str(n): 0.0 for n in range(1001)}), "at most 1000 metrics"),
        (Provenance(description="x" * 70_000), "description has 70000 characters"),
        (Provenance(git_commit="\0"), "git_commit holds characters that cannot be kept"),
        (Provenance(labels={"a b": ""}), "found 'a b' as a label"),
        (
            Provenance(inputs=tuple(TensorSignature("x" * 900, "FP32", (2**62,) * 300) for _ in range(1000))),
            f"is too large; at most {LARGEST_DOCUMENT_BYTES} are kept",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_provenance_that_cannot_be_kept(database: Database, provenance: Provenance, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        database.run_blocking(
            lambda s: versions.add_version(s, "digits", make_manifest(), provenance, actor="al", create_model=True)
        )
    assert database.read_blocking(models.list_models).items == ()


def test_objectives(database: Database) -> None:
    with pytest.raises(NotFoundError):
        database.run_blocking(lambda s: objectives.set_objective(s, "digits", {}, actor="al"))
    database.run_blocking(lambda s: models.register(s, "digits", actor="al"))
    with pytest.raises(NotFoundError, match="has no objective"):
        database.read_blocking(lambda s: objectives.get_objective(s, "digits"))
    for objective in ({"percentile": 99.9}, {"latency_us": 2**40}):
        database.run_blocking(lambda s, it=objective: objectives.set_objective(s, "digits", it, actor="al"))
        assert database.read_blocking(lambda s: objectives.get_objective(s, "digits")) == objective
    assert database.read_blocking(objectives.list_objectives) == {"digits": objective}


def test_uploads(database: Database) -> None:
    run = database.run_blocking
    archive = {"archive_format": "tar", "size_bytes": 2**40, "sha256": "a" * 64, "actor": "al"}
    begun = run(lambda s: upload_rows.begin_upload(s, "digits", "u1", **archive, expiry_s=60.0))
    assert (begun.received_bytes, begun.version, begun.size_bytes) == (0, 0, 2**40)
    run(lambda s: upload_rows.advance_upload(s, "digits", "u1", received_bytes=2**33, detail={"parts": [1]}))
    again = run(lambda s: upload_rows.begin_upload(s, "digits", "u1", **archive, expiry_s=60.0))
    assert (again.received_bytes, again.detail) == (2**33, {"parts": [1]})
    for other in ({"sha256": "b" * 64}, {"actor": "bo"}):
        with pytest.raises(Conflict, match="is of another archive"):
            run(lambda s, it={**archive, **other}: upload_rows.begin_upload(s, "digits", "u1", **it, expiry_s=60.0))
    assert run(upload_rows.read_expired_uploads) == ()
    run(lambda s: upload_rows.begin_upload(s, "digits", "u2", **archive, expiry_s=-1.0))
    assert [each.upload_id for each in run(upload_rows.read_expired_uploads)] == ["u2"]
    run(lambda s: upload_rows.drop_upload(s, "digits", "u2"))
    with pytest.raises(NotFoundError, match="model 'digits' has no upload 'u2'"):
        run(lambda s: upload_rows.get_upload(s, "digits", "u2"))
