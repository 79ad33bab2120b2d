"""What must be so in a registry at any moment, also just after a kill -9: of its tables, and of its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos_book import Book
from sqlalchemy import func, select

from aiorch_server.deployments.rollout import TRANSITIONS, plan_wish
from aiorch_server.registry import schema
from aiorch_server.registry.audit import query_audit
from aiorch_server.registry.audit_check import AuditCheck, step_audit_check
from aiorch_server.registry.database import Database
from aiorch_server.registry.deployments import find_deployment
from aiorch_server.registry.events import read_events
from aiorch_server.registry.layout import Layout
from aiorch_server.registry.leases import Lease, find_lease
from aiorch_server.registry.models import get as get_model
from aiorch_server.registry.records import (
    Deployment,
    Event,
    Manifest,
    ModelVersion,
    Rollout,
    RolloutState,
    Strategy,
)
from aiorch_server.registry.rollouts import find_newest_rollout, find_open_rollout
from aiorch_server.registry.session import Session
from aiorch_server.registry.upload_rows import Upload
from aiorch_server.registry.versions import list_versions

_SAID = re.compile(rf"rollout \S+ of .*? is ({'|'.join(RolloutState)}): ")
S = RolloutState


@dataclass
class Found:
    """What the registry says of one model."""

    versions: dict[int, ModelVersion]
    deployment: Deployment | None
    newest: Rollout | None
    is_rolling: bool
    #: Whether the change that nobody was told of yet was made.
    is_pending_made: bool
    #: The last two states of each rollout.
    ends: dict[str, tuple[RolloutState, RolloutState]] = field(default_factory=dict)


@dataclass
class Registry:
    """All of it, as one transaction sees it."""

    models: dict[str, Found]
    events: tuple[Event, ...]
    uploads: tuple[Upload, ...]
    lease: Lease | None

    @property
    def manifests(self) -> list[Manifest]:
        return [each.manifest for found in self.models.values() for each in found.versions.values()]


@contextlib.contextmanager
def copy_of(url: str, folder: Path) -> Iterator[str]:
    """The database as a killed server has left it, to look at: the server's own next start finds it untouched."""
    if not url.startswith("sqlite"):
        yield url
        return
    source = Path(url.removeprefix("sqlite:///"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for each in source.parent.glob(f"{source.name}*"):
        shutil.copyfile(each, folder / each.name)
    with sqlite3.connect(folder / source.name) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
    yield f"sqlite:///{folder / source.name}"


def check_registry(url: str, books: Sequence[Book], watched: Sequence[int] = ()) -> Registry:
    """Everything that holds whatever is under way, but no step of an operator. AssertionError tells what does not."""
    database = Database(url)
    try:
        return database.read_blocking(lambda session: _check(session, books, watched))
    finally:
        database.close()


def _check(session: Session, books: Sequence[Book], watched: Sequence[int]) -> Registry:
    _check_audit(session)
    events = _check_events(session, watched)
    moves = _check_moves(events)
    models = {book.model: _check_model(session, book, moves) for book in books}
    uploads = tuple(Upload(**row._mapping) for row in session.execute(select(schema.uploads)))
    for upload in uploads:
        if upload.version:
            assert upload.version in models[upload.model].versions, f"{upload} came to a version that is not there"
    return Registry(models, events, uploads, find_lease(session, "rollouts"))


def _check_audit(session: Session) -> None:
    check = AuditCheck()
    while not check.is_finished:
        check = step_audit_check(session, check)
    assert check.is_intact, check.reason


def _check_events(session: Session, watched: Sequence[int]) -> tuple[Event, ...]:
    events: list[Event] = []
    while more := read_events(session, after=events[-1].number if events else 0):
        events += more
    numbers = [event.number for event in events]
    assert numbers == sorted(set(numbers))
    assert [event.time for event in events] == sorted(event.time for event in events)
    lost = set(watched) - set(numbers)
    assert not lost, f"events {lost} were told to a watcher, and are not there"
    assert list(watched) == numbers[: len(watched)], "a watcher missed events, or saw them in another order"
    return tuple(events)


def _check_moves(events: Sequence[Event]) -> dict[str, list[RolloutState]]:
    """The states that each rollout went through, all of them legal."""
    moves: dict[str, list[RolloutState]] = {}
    for event in events:
        if event.kind == "rollout.began":
            assert event.rollout not in moves, f"rollout {event.rollout} began twice"
            moves[event.rollout] = []
        elif event.kind in ("rollout.step", "rollout.ended"):
            said = _SAID.match(event.text)
            assert said is not None, event.text
            states, state = moves[event.rollout], S(said[1])
            before = states[-1] if states else None
            befores = (before,) if before else (S.PENDING, S.LOADING)
            is_legal = any((each, state) in TRANSITIONS for each in befores)
            # its model was taken out of service
            is_legal |= state is S.ABORTED and event.text.endswith("undeploy") and not (before and before.is_end)
            assert is_legal, f"rollout {event.rollout} went from {before} to {state}: {event.text}"
            states.append(state)
    return moves


def _check_model(session: Session, book: Book, moves: dict[str, list[RolloutState]]) -> Found:
    name = book.model
    done = _check_done(session, book)
    versions = {each.version: each for each in list_versions(session, name, size=1000).items}
    extra = set(versions) ^ set(book.versions)
    if not done:  # what nobody was told of yet is not done
        assert not extra, f"{name}: versions {sorted(versions)}, acknowledged are {sorted(book.versions)}"
        assert dict(get_model(session, name).aliases) == book.aliases, name
        assert get_model(session, name).description == book.description, name
    assert len(extra) <= 1, f"{name}: versions {sorted(versions)}, acknowledged are {sorted(book.versions)}"
    for number, content in book.versions.items():
        if number in versions:
            assert {each.path: each.sha256 for each in versions[number].manifest.files} == content.digests
    numbers = sorted({*versions, *book.versions, *book.deleted})
    assert numbers == list(range(1, len(numbers) + 1)), f"{name}: numbers were left out: {numbers}"
    given = session.execute(select(schema.numbers.c.version).where(schema.numbers.c.model == name)).scalar()
    assert given == len(numbers), (name, given, numbers)
    opened = find_open_rollout(session, name)
    newest = find_newest_rollout(session, name)
    deployment = find_deployment(session, name)
    if opened is not None:
        assert newest is not None and opened.id == newest.id
        assert deployment is not None, f"{name}: rollout {opened.id} is under way without a deployment"
        wish = plan_wish(opened)
        found = (deployment.loaded, deployment.traffic, deployment.shadow, deployment.sampled)
        assert found == (wish.loaded, wish.traffic, wish.shadow, wish.sampled), f"{deployment} during {opened}"
    known = {row.id: RolloutState(row.state) for row in session.execute(_select_rollouts(name))}
    assert book.rollouts <= set(known), f"{name}: acknowledged rollouts are gone: {book.rollouts - set(known)}"
    for id, state in known.items():
        told = moves[id][-1:] or [S.PENDING, S.LOADING]
        assert state in told, f"rollout {id} is {state}, the events say {moves[id]}"
    n_open = session.execute(
        select(func.count()).where(schema.rollouts.c.model == name, schema.rollouts.c.ended_at.is_(None))
    ).scalar()
    assert n_open == (opened is not None), f"{name}: {n_open} rollouts have not ended"
    if not done:
        assert (deployment is not None) == book.is_deployed, f"{name}: {deployment}"
        if deployment is not None:
            assert deployment.instances == book.instances, f"{name}: {deployment.instances} instances"
    ends = {id: (each[-2], each[-1]) for id, each in moves.items() if len(each) > 1}
    return Found(versions, deployment, newest, opened is not None, done, ends)


def _check_done(session: Session, book: Book) -> bool:
    """Each acknowledged change was made exactly once, in order; gives whether the pending one was made, too."""
    entries, token = [], ""
    while True:
        page = query_audit(session, model=book.model, size=1000, token=token)
        entries += [each for each in page.items if each.outcome == "OK"]
        token = page.token
        if not token:
            break
    entries.reverse()
    steps = [*book.done, *([book.pending] if book.pending is not None else [])]
    told = [f"{each.method} {each.detail}" for each in entries]
    asked = [f"{each.method} {dict(each.told)}" for each in steps]
    assert len(book.done) <= len(entries) <= len(steps), (
        f"{book.model}: {len(entries)} changes are in the audit log, {len(book.done)} were acknowledged, "
        f"{len(steps) - len(book.done)} are pending; the last ones are\n{told[-4:]}\n{asked[-4:]}"
    )
    for number, (entry, step) in enumerate(zip(entries, steps, strict=False)):
        detail = json.loads(entry.detail)
        is_it = entry.method == step.method and all(detail.get(key) == value for key, value in step.told.items())
        assert is_it, f"{book.model}: change {number} is {told[number]}, asked for was {asked[number]}"
    return len(entries) > len(book.done)


def _select_rollouts(model: str):  # type: ignore[no-untyped-def]
    return select(schema.rollouts.c.id, schema.rollouts.c.state).where(schema.rollouts.c.model == model)


def check_end(book: Book, found: Found) -> None:
    """With no rollout under way: what is deployed is what the last change made it."""
    deployment, newest = found.deployment, found.newest
    if deployment is None:
        return
    shares = {each.version: each.share / 100 for each in deployment.traffic if each.share}
    if book.by_hand is not None:
        expected = {version: share for version, share in book.by_hand.items() if share}
    else:
        assert newest is not None and newest.state.is_end
        is_over = found.ends.get(newest.id) == (S.RUNNING, S.SUCCEEDED) and newest.plan.strategy is Strategy.SHADOW
        has_won = newest.state is S.SUCCEEDED and not is_over
        version = newest.to_version if has_won else newest.from_version
        expected = {version: 100.0} if version else {}
    assert shares == expected and set(deployment.loaded) == set(expected), f"{book.model}: {deployment} after {newest}"


class Files:
    """The store and the caches; content that was read is not read again while nothing touched it."""

    def __init__(self, artefacts: Path, caches: Collection[Path]) -> None:
        self._artefacts, self._caches = artefacts, tuple(caches)
        self._known: dict[Path, tuple[int, int, int, str]] = {}

    def digest(self, path: Path) -> str:
        status = path.stat()
        mark = (status.st_ino, status.st_mtime_ns, status.st_size)
        known = self._known.get(path)
        if known is None or known[:3] != mark:
            known = self._known[path] = (*mark, hashlib.sha256(path.read_bytes()).hexdigest())
        return known[3]

    def blobs(self) -> dict[str, Path]:
        return {path.name: path for path in (self._artefacts / "blobs").glob("*/*")}

    def check_store(self, registry: Registry, *, live: int) -> set[str]:
        """Each blob is whole, each version's are there; gives those that no version has. ``live`` servers run."""
        blobs = self.blobs()
        for name, path in blobs.items():
            assert path.parent.name == name[:2] and self.digest(path) == name, f"{path} is not what its name says"
        wanted = {file.sha256: file for manifest in registry.manifests for file in manifest.files}
        missing = set(wanted) - set(blobs)
        assert not missing, f"blobs of versions are missing: {missing}"
        for sha256, file in wanted.items():
            assert blobs[sha256].stat().st_size == file.size_bytes
        staged = [*(self._artefacts / "staging").iterdir()]
        assert len(staged) <= live, f"left in staging: {staged}"
        return set(blobs) - set(wanted)

    def check_caches(self, registry: Registry, *, is_settled: bool) -> None:
        """Each tree of a known version is whole; with everything settled, what is deployed is there."""
        for cache in self._caches:
            trees = {(tree.name.partition("-")[0]): tree for tree in (cache / "trees").iterdir()}
            for model, found in registry.models.items():
                for number, version in found.versions.items():
                    manifest = version.manifest
                    key = hashlib.sha256(f"{model}\0{number}\0{manifest.digest}".encode()).hexdigest()[:32]
                    if key in trees:
                        layout = Layout(model, number, manifest)
                        for file in manifest.files:
                            path = trees[key] / model / layout.place(file)
                            assert self.digest(path) == file.sha256, f"{path} is not {file}"
                    elif is_settled and found.deployment is not None:
                        is_wanted = number in found.deployment.loaded
                        assert not is_wanted, f"{cache} has no {model} {number}"
            with contextlib.suppress(FileNotFoundError):
                json.loads((cache / "last-known.json").read_text())
            staged = [*(cache / "staging").iterdir()]
            assert len(staged) <= 1, f"left in {cache}: {staged}"
