"""What the registry calls a server."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from aiorch_server.deployments.identity import name_server
from aiorch_server.errors import StoreUnavailable

ADDRESS = "models:8001"


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_restart_keeps_the_name(tmp_path: Path) -> None:
    name = name_server(ADDRESS, tmp_path)
    assert name.startswith(f"{ADDRESS} ")
    assert name_server(ADDRESS, tmp_path) == name


def test_containers_of_one_host_name_and_port_are_told_apart(tmp_path: Path) -> None:
    assert name_server(ADDRESS, make_folder(tmp_path / "a")) != name_server(ADDRESS, make_folder(tmp_path / "b"))


def test_two_servers_of_one_folder_differ_by_their_port(tmp_path: Path) -> None:
    assert name_server("models:8001", tmp_path) != name_server("models:8002", tmp_path)


@pytest.mark.parametrize("left", [b"", b"3f0c\n", b"\xff\x00garbage", b"../../etc\n"])
def test_what_a_crash_left_is_no_name(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "server-id").write_bytes(left)
    name = name_server(ADDRESS, tmp_path)
    assert len(name) == len(ADDRESS) + 9 and name.isascii()
    assert name_server(ADDRESS, tmp_path) == name


def test_servers_that_start_at_once_agree(tmp_path: Path) -> None:
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(name_server(ADDRESS, tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 8 and len(set(names)) == 1


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"cache folder .*writing this server's name failed"):
        name_server(ADDRESS, tmp_path / "file")
