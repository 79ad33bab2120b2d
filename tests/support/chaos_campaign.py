"""Rounds of: everything at once, kill -9, look at what is left, start again, look at what is served."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from aiorch_client.admin import AdminClient, DeploymentState
from aiorch_client.errors import ClientError
from chaos_book import Book
from chaos_checks import Files, Found, Registry, check_end, check_registry, copy_of
from chaos_load import Asker, Load
from chaos_operator import Operator
from chaos_site import Server, Timeline
from patience import PATIENCE

from aiorch_server.deployments.driver import LEASE_S
from aiorch_server.registry.store import open_store

SERVED_LIMIT_S = 30.0 * PATIENCE
SETTLED_LIMIT_S = 60.0 * PATIENCE
#: What a driver that waits for the lease may take besides.
TAKEOVER_SLACK_S = 8.0 * PATIENCE


class Watcher:
    """Follows the events through all kills; what it was told is in ``numbers``."""

    def __init__(self, server: Server) -> None:
        self.numbers: list[int] = []
        self.failure = ""
        self._client = AdminClient(server.target)
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for event in self._client.watch(after=0, patience_s=300.0):
                self.numbers.append(event.number)
        except ClientError as error:
            if error.code is not grpc.StatusCode.CANCELLED:
                self.failure = str(error)

    def close(self) -> None:
        self._client.close()
        self._thread.join(30)


class Campaign:
    """``url`` names an empty database; ``n_servers`` share it. ``run`` does the rounds, ``result`` sums up."""

    def __init__(self, folder: Path, url: str, *, seed: int, n_servers: int = 1, most_bytes: int = 3 << 20) -> None:
        self.folder, self.url, self.seed = folder, url, seed
        self.timeline = Timeline()
        self.rng = random.Random(f"{seed} campaign")
        artefacts = folder / "artefacts"
        self.servers = [
            Server(f"server{number}", folder / f"server{number}", url, artefacts, self.timeline)
            for number in range(n_servers)
        ]
        self.files = Files(artefacts, [server.cache for server in self.servers])
        self.artefacts = artefacts
        self.books = [Book(f"{kind}{n}", kind == "steady") for n in range(2) for kind in ("steady", "loose")]
        self.counts: Counter[str] = Counter()
        self.takeovers_s: list[float] = []
        for server in self.servers:
            server.start()
        self.operators = [
            Operator(
                f"operator{n}", self.servers, self.books[2 * n : 2 * n + 2], folder / "contents", self.timeline,
                seed=seed, most_bytes=most_bytes,
            )
            for n in range(2)
        ]  # fmt: skip
        self.watcher = Watcher(self.servers[0])
        self.load: Load | None = None

    def run(self, rounds: int, *, settle_each: int = 10) -> None:
        self.prepare()
        for number in range(1, rounds + 1):
            self.strike()
            if number % settle_each == 0 or number == rounds:
                self.settle()
        self.finish()

    def prepare(self) -> None:
        """Deploys a first version of each model, and begins with the requests."""
        for operator in self.operators:
            for book in operator.books:
                assert operator.do(book, operator.register(book))
                while not any(not content.refuses for content in book.versions.values()):
                    assert operator.do(book, operator.push(book))
                while not (book.is_deployed and self._serves(book)):
                    operator.do(book, operator.deploy(book))
        names = [book.model for book in self.books]
        steady = [book.model for book in self.books if book.is_steady]
        self.load = Load(
            self.servers, self.timeline, steady=steady, loose=sorted(set(names) - set(steady)), seed=self.seed
        )
        self._release()

    def strike(self) -> None:
        """One kill at a random moment, and all that follows."""
        self.counts["rounds"] += 1
        victim = self.rng.choice(self.servers)
        self._wait_moment()
        victim.kill()
        self.counts["kills"] += 1
        killed_at = time.monotonic()
        self._hold()
        registry = self._check(is_offline=True)
        self.counts["made unanswered"] += sum(found.is_pending_made for found in registry.models.values())
        others = [server for server in self.servers if server is not victim]
        if others and registry.lease is not None and f":{victim.port} " in f"{registry.lease.holder} ":
            self._release()
            self._wait_takeover(victim, killed_at)
        elif others:
            self._release()
        while self.rng.random() < 0.2:  # it comes to no end of its start
            victim.launch()
            time.sleep(self.rng.uniform(0.0, 2.0))
            victim.kill()
            self.counts["kills"] += 1
            self.counts["kills of starts"] += 1
        victim.start()
        self._hold()
        for operator in self.operators:
            operator.resolve()
        self._check()
        self._wait_served()
        self._release()

    def settle(self) -> None:
        """Every rollout comes to its end, and what serves is what it ended with; nothing is left of what was not."""
        self._hold()
        for operator in self.operators:
            operator.resolve()
        until = time.monotonic() + SETTLED_LIMIT_S
        while rolling := [(name, found) for name, found in self._read().models.items() if found.is_rolling]:
            assert time.monotonic() < until, f"rollouts do not end: {[found.newest for _, found in rolling]}"
            for name, found in rolling:
                assert found.newest is not None
                is_endless = found.newest.plan.strategy == "ab" and found.newest.state == "running"
                if is_endless or found.newest.state == "paused":
                    self._decide(name)
            time.sleep(0.1)
        registry = self._check()
        for book in self.books:
            check_end(book, registry.models[book.model])
        self._wait_served(is_settled=True)
        self.files.check_caches(self._read(), is_settled=True)
        self.counts["settled"] += 1
        self._release()

    def finish(self) -> None:
        """Ends everything in good order; the last looks."""
        self._hold()
        assert self.load is not None
        self.load.stop()
        registry = self._check()
        until = time.monotonic() + SERVED_LIMIT_S
        while len(self.watcher.numbers) < len(registry.events) and time.monotonic() < until:
            time.sleep(0.05)
        self.watcher.close()
        assert self.watcher.numbers == [event.number for event in registry.events], self.watcher.failure
        for server in self.servers:
            server.end()
        self._check_garbage(registry)
        complaints = [line for server in self.servers for line in server.find_complaints()]
        assert not complaints, complaints

    def close(self) -> None:
        for operator in self.operators:
            operator.close()
        if self.load is not None:
            self.load.stop()
        self.watcher.close()
        for server in self.servers:
            server.close()

    def result(self) -> dict[str, Any]:
        """The figures of what was done."""
        counts = sum((operator.counts for operator in self.operators), Counter())
        tally = self.load.tally if self.load is not None else None
        starts = sorted(start for server in self.servers for start in server.starts_s)
        return {
            "rounds": self.counts["rounds"],
            "kills": self.counts["kills"],
            "kills_of_starts": self.counts["kills of starts"],
            "settled": self.counts["settled"],
            "acknowledged": counts["acknowledged"],
            "refused": counts["refused"],
            "unacknowledged": counts["unacknowledged"],
            "made_unanswered": self.counts["made unanswered"],
            "repeats": counts["repeats"],
            "acknowledged_on_repeat": counts["acknowledged on repeat"],
            "versions": sum(len(book.versions) + len(book.deleted) for book in self.books),
            "rollouts": sum(len(book.rollouts) for book in self.books),
            "events": len(self.watcher.numbers),
            "requests_answered": tally.answered if tally else 0,
            "requests_wrong": len(tally.wrong) if tally else 0,
            "requests_failed": len(tally.failed) if tally else 0,
            "requests_unconnected": tally.unconnected if tally else 0,
            "median_start_s": round(starts[len(starts) // 2], 2),
            "longest_start_s": round(starts[-1], 2),
            "takeovers": len(self.takeovers_s),
            "longest_takeover_s": round(max(self.takeovers_s, default=0.0), 2),
        }

    def tell_events(self, count: int = 80) -> None:
        """Prints what the registry says has happened lately, if it can be asked."""
        with contextlib.suppress(Exception):
            from aiorch_server.registry.database import Database
            from aiorch_server.registry.events import last_event_number, read_events

            database = Database(self.url)
            found = database.read_blocking(lambda s: read_events(s, after=last_event_number(s) - count))
            database.close()
            print("== the last events", *(f"{each.time:%H:%M:%S.%f} {each.text}" for each in found), sep="\n")

    # parts

    def _wait_moment(self) -> None:
        """Some time, or a part of one after a step has begun."""
        if self.rng.random() < 0.3:
            time.sleep(self.rng.uniform(0.02, 2.5))
            return
        operator = self.rng.choice(self.operators)
        while operator.begun.acquire(blocking=False):
            pass
        for _ in range(self.rng.randrange(1, 5)):
            operator.begun.acquire(timeout=5.0)
        # what most steps take, uploads and what follows of deploys take longer
        time.sleep(10 ** self.rng.uniform(-3.0, -1.5 if self.rng.random() < 0.6 else -0.3))

    def _hold(self) -> None:
        for operator in self.operators:
            operator.hold()

    def _release(self) -> None:
        self._check_none_failed()
        for operator in self.operators:
            operator.release()

    def _check_none_failed(self) -> None:
        failures = [text for operator in self.operators for text in operator.failures]
        assert not failures, failures
        if self.load is not None:
            tally = self.load.tally
            assert not tally.wrong, tally.wrong
            assert not tally.failed, f"{len(tally.failed)} requests failed: {tally.failed[:5]}"
            for (model, version), sums in list(tally.sums.items()):
                content = next(book for book in self.books if book.model == model).content(version)
                is_right = content is None or sums == {float(content.number)}
                assert is_right, f"version {version} of {model} answered {sums}, not with {content}"

    def _read(self) -> Registry:
        return check_registry(self.url, self.books)

    def _check(self, *, is_offline: bool = False) -> Registry:
        """The tables as they are, or with the only server dead a copy of them; and the files."""
        is_copied = is_offline and len(self.servers) == 1
        with copy_of(self.url, self.folder / "copy") if is_copied else contextlib.nullcontext(self.url) as url:
            watched = tuple(self.watcher.numbers)
            registry = check_registry(url, self.books, watched)
        # what a killed server left in staging goes when the next one starts
        live = len(self.servers) + (is_offline and self.counts["kills"])
        orphans = self.files.check_store(registry, live=live)
        self.counts["orphans"] = len(orphans)
        self.files.check_caches(registry, is_settled=False)
        self._check_none_failed()
        return registry

    def _wait_takeover(self, victim: Server, killed_at: float) -> None:
        """Until another server drives, which has to be soon after the lease of the killed one ran out."""
        until = killed_at + LEASE_S + TAKEOVER_SLACK_S
        while True:
            lease = self._read_lease()
            if lease is not None and f":{victim.port} " not in f"{lease} ":
                break
            assert time.monotonic() < until, f"nobody took the lease from {victim.name}: {lease}"
            time.sleep(0.1)
        self.takeovers_s.append(time.monotonic() - killed_at)
        self.timeline.note(f"the lease was taken over after {self.takeovers_s[-1]:.2f} s")

    def _read_lease(self) -> str | None:
        from aiorch_server.registry.database import Database
        from aiorch_server.registry.leases import find_lease

        database = Database(self.url)
        try:
            lease = database.read_blocking(lambda session: find_lease(session, "rollouts"))
        finally:
            database.close()
        return None if lease is None else lease.holder

    def _decide(self, model: str) -> None:
        """Ends a rollout that waits for a person."""
        for operator in self.operators:
            for book in operator.books:
                if book.model == model:
                    operator.do(book, self.rng.choice((operator.promote, operator.abort, operator.rollback))(book))

    def _serves(self, book: Book) -> bool:
        """Whether the deployment of a held operator's model is done and has a version that serves."""
        with AdminClient(self.servers[0].target) as client:
            found = client.wait_ready(book.model, timeout_s=SETTLED_LIMIT_S, look_s=0.05)
            if found.rollout is not None and not found.rollout.state.is_end:
                found_rollout = client.wait(found.rollout, timeout_s=SETTLED_LIMIT_S, look_s=0.05)
                found = client.wait_ready(book.model, timeout_s=SETTLED_LIMIT_S, look_s=0.05)
                return found_rollout.state.value == "succeeded"
            return found.state is DeploymentState.READY and bool(found.traffic)

    def _wait_served(self, *, is_settled: bool = False) -> None:
        """Until each server's answers are those that the registry wants, seen between two equal looks at it."""
        until = time.monotonic() + SERVED_LIMIT_S
        for server in self.servers:
            with contextlib.closing(Asker(server.target)) as asker:
                for book in self.books:
                    while (problem := self._find_unserved(asker, book)) and time.monotonic() < until:
                        time.sleep(0.1)
                    assert not problem, f"{server.name} does not serve {book.model} as deployed: {problem}"

    def _find_unserved(self, asker: Asker, book: Book) -> str:
        """What is served otherwise than deployed; "" where nothing is."""
        before = self._read().models[book.model]
        problem = self._ask_all(asker, book, before)
        after = self._read().models[book.model]
        is_same = _generation(before) == _generation(after)
        return problem if is_same else problem and f"{problem} (and the deployment has changed meanwhile)"

    def _ask_all(self, asker: Asker, book: Book, found: Found) -> str:
        deployment = found.deployment
        loaded = set(deployment.loaded) if deployment is not None else set()
        shares = {each.version for each in deployment.traffic if each.share} if deployment is not None else set()
        serving = {version for version in loaded if not found_refuses(book, version)}
        for version in sorted({*loaded, *book.versions}):
            content = book.content(version)
            try:
                _, added = asker.ask(book.model, 7.0, version=str(version))
            except grpc.RpcError as error:
                if version in serving:
                    return f"version {version}: {error.code().name}: {error.details()}"
                continue
            if version not in serving:
                return f"version {version} is served, deployed are {sorted(loaded)}"
            if content is not None:
                assert added == content.number, f"{book.model} {version} adds {added}, not {content.number}"
        for number in range(20):
            try:
                version, _ = asker.ask(book.model, 7.0, key=f"key{number}")
            except grpc.RpcError as error:
                if serving & shares:
                    return f"{error.code().name}: {error.details()}"
                continue
            if version not in shares & serving and (shares & serving):
                return f"version {version} answers, shares have {sorted(shares)}"
        return ""

    def _check_garbage(self, registry: Registry) -> None:
        """What no version has is taken away when it is old enough, and nothing else."""
        from datetime import UTC, datetime, timedelta

        from aiorch_server.registry.collect import collect_garbage

        wanted = {file.sha256 for manifest in registry.manifests for file in manifest.files}
        store = open_store(str(self.artefacts))
        try:
            now = datetime.now(UTC) + timedelta(seconds=5)
            collect_garbage(store, lambda: wanted, now=now, grace=timedelta())
        finally:
            store.close()
        assert set(self.files.blobs()) == wanted
        assert not list((self.artefacts / "staging").iterdir())


def found_refuses(book: Book, version: int) -> bool:
    content = book.content(version)
    return content is not None and content.refuses


def _generation(found: Found) -> tuple[int, ...]:
    return () if found.deployment is None else (found.deployment.generation,)


@contextlib.contextmanager
def campaign(folder: Path, url: str, *, seed: int, **options: Any) -> Iterator[Campaign]:
    """A campaign whose failures tell how they came about, and how to have them again."""
    made = None
    try:
        made = Campaign(folder, url, seed=seed, **options)
        yield made
    except BaseException:
        print(f"== failed with seed {seed} on {url.partition(':')[0]}")
        if made is not None:
            print(made.timeline.tell())
            made.tell_events()
            for server in made.servers:
                print(f"== the end of the log of {server.name}\n{server.tell_log(4000)}")
        raise
    finally:
        if made is not None:
            made.close()
