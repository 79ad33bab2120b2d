"""Tokens of an OpenID provider that somebody else wrote: npm's oidc-provider, found by discovery."""

from __future__ import annotations

import asyncio
import hashlib
import json
import select
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from issuers import make_private, show_key
from secured import DOORS, SERVICE, TIMEOUT_S, Secured, serve_secured

HERE = Path(__file__).parent / "node"
ROOT = Path(__file__).parents[3]
INSTALL_LIMIT_S = 110
START_LIMIT_S = 30.0
SECRET = "a-secret-of-the-robot"


@pytest.fixture(scope="session")
def provider_folder() -> Path:
    """The packages of the lock file and the provider's script, installed once under .cache."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is missing; these tests need Node: deploy/install-packages nodejs npm")
    lock = (HERE / "package-lock.json").read_bytes()
    folder = ROOT / ".cache" / "tests" / f"issuer-{hashlib.sha256(lock).hexdigest()[:12]}"
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
        assert ran.returncode == 0, f"npm could not install {HERE}/package-lock.json:\n{ran.stdout}{ran.stderr}"
        done.touch()
    shutil.copy(HERE / "issuer.mjs", folder)  # a module finds packages beside it alone
    return folder


class Provider:
    """The provider as a process, always on the same port."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder, self._scratch = folder, scratch
        self._process: subprocess.Popen[str] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, keys: Sequence[dict[str, Any]]) -> None:
        path = self._scratch / "keys.json"
        path.write_text(json.dumps(keys))
        command = ["node", "issuer.mjs", str(self.port), SECRET, str(path)]
        self._process = subprocess.Popen(
            command, cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_LIMIT_S)
        assert ready and self._process.stdout.readline() == "listening\n", "the provider did not start"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    async def grant(self, algorithm: str = "RS256") -> str:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            answer = await http.post(
                f"{self.url}/token",
                data={"grant_type": "client_credentials", "scope": "infer"},
                auth=("robot", SECRET),
                headers={"x-algorithm": algorithm},
            )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])


@pytest.fixture
def provider(provider_folder: Path, tmp_path: Path) -> Iterator[Provider]:
    running = Provider(provider_folder, tmp_path)
    yield running
    running.stop()


def make_keys(index: int) -> list[dict[str, Any]]:
    return [
        show_key(make_private("RS256", index), f"rsa-{index}", is_private=True, use="sig"),
        show_key(make_private("ES256", index), f"ec-{index}", is_private=True, use="sig", alg="ES256"),
        show_key(make_private("EdDSA", index), f"ed-{index}", is_private=True, use="sig", alg="EdDSA"),
    ]


def make_settings(provider: Provider) -> dict[str, Any]:
    tokens = {
        "issuer": provider.url, "audience": ["aiorch"], "refresh_secs": 1, "refresh_min_secs": 1, "prefix": "oidc:",
    }  # fmt: skip
    binding = {"principal": "group:oidc:robots", "role": "client", "models": "own-*"}
    return {"tokens": [tokens], "bindings": [binding]}


async def until(site: Secured, token: str, code: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (answer := await site.infer(token)).code != code:
            await asyncio.sleep(0.05)
    assert answer.code == code


@pytest.mark.parametrize("door", DOORS)
async def test_its_tokens_open_the_doors(models: Path, provider: Provider, door: str) -> None:
    provider.start(make_keys(0))
    async with serve_secured(models, door, security=make_settings(provider)) as site:
        for algorithm in ("RS256", "PS256", "ES256", "EdDSA"):
            token = await provider.grant(algorithm)
            for _ in range(2):
                assert (await site.infer(token)).code == "OK", algorithm
            assert (await site.infer(token, "other-one")).text.endswith("is not found")
            assert (await site.ask("GET", "/v2/models/own-one", token)).status_code == 200
        refused = await site.call(f"{SERVICE}/RepositoryModelUnload", b"\x12\x07own-one", token)
        assert refused.text.startswith("'oidc:robot' needs the role deployer on model 'own-one'")


async def test_keys_change_and_the_issuer_goes_away(models: Path, provider: Provider) -> None:
    provider.start(make_keys(0))
    async with serve_secured(models, security=make_settings(provider)) as site:
        old = await provider.grant()
        assert (await site.infer(old)).code == "OK"
        # away: what is known stays in force
        provider.stop()
        for _ in range(3):
            assert (await site.infer(old)).code == "OK"
        site.application._gate.forget()  # type: ignore[union-attr]
        assert (await site.infer(old)).code == "OK"
        # another key beside the old one: both hold, the new one at once or with the next look
        provider.start([*make_keys(1), *make_keys(0)])
        new = await provider.grant()
        await until(site, new, "OK")
        assert (await site.infer(old)).code == "OK"
        # the old one is gone: what it has signed is refused, though a pass had let it through
        provider.stop()
        provider.start(make_keys(1))
        await until(site, old, "UNAUTHENTICATED")
        assert (await site.infer(new)).code == "OK"


async def test_an_issuer_that_is_not_there_at_the_start(models: Path, provider: Provider) -> None:
    """The server starts, says of tokens that it cannot tell, and can once the issuer is there."""
    provider.start(make_keys(0))
    token = await provider.grant()
    provider.stop()
    async with serve_secured(models, security=make_settings(provider)) as site:
        answer = await site.infer(token)
        assert (answer.code, answer.text.partition(" cannot be had")[0]) == (
            "UNAVAILABLE",
            f"the keys of {provider.url}",
        )
        assert (await site.ask("GET", "/v2", token)).status_code == 503
        assert (await site.ask("GET", "/v2", "viewer")).status_code == 200, "keys of the server's own hold"
        provider.start(make_keys(0))
        await until(site, token, "OK")
