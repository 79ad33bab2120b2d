"""Output that nobody reads: taken without waiting, bounded, and written in order once somebody does."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

from aiorch_server.cli.outlet import Outlet, never_waiting

LIMIT_S = 20


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """The end to read, and the other as a stream."""
    reading, writing = os.pipe()
    with contextlib.suppress(OSError), open(writing, "w", encoding="utf-8") as stream:  # noqa: PTH123
        yield reading, stream
    with contextlib.suppress(OSError):
        os.close(reading)


def read_until(reading: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        chunk = os.read(reading, 1 << 16)
        assert chunk, data[-100:]
        data += chunk
    return data


def test_lines_in_order_from_many_threads(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    outlet = Outlet(stream)

    def tell(name: int) -> None:
        for number in range(500):
            outlet.write(f"{name} {number} é\n")

    threads = [threading.Thread(target=tell, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    lines = [read_until(reading, b"\n")]
    while sum(chunk.count(b"\n") for chunk in lines) < 2_000:
        lines.append(os.read(reading, 1 << 16))
    for thread in threads:
        thread.join(LIMIT_S)
    told = [line.split() for line in b"".join(lines).decode().splitlines()]
    for name in range(4):
        assert [int(number) for who, number, _ in told if who == str(name)] == list(range(500))


def test_what_is_too_much_is_left_out_and_counted(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    outlet = Outlet(stream, max_characters=200_000)
    line = "x" * 999 + "\n"
    for _ in range(1_000):
        assert outlet.write(line) == 1_000
    outlet.drain(0.0)  # nobody reads: it does not wait
    data = read_until(reading, b"nobody read this\n").decode()
    told = data.splitlines()
    assert all(text == line[:-1] for text in told[:-1])
    assert 200 <= len(told) - 1 <= 400
    assert told[-1] == f"... {1_000 - (len(told) - 1)} more were left out: nobody read this"
    outlet.write("and on\n")
    assert read_until(reading, b"and on\n") == b"and on\n"


def test_a_descriptor_that_does_not_wait_loses_nothing(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    os.set_blocking(stream.fileno(), False)
    outlet = Outlet(stream)
    text = "".join(f"{number}\n" for number in range(60_000))
    outlet.write(text)
    outlet.write("end\n")
    assert read_until(reading, b"end\n").decode() == text + "end\n"


def test_a_reader_that_is_gone_ends_it(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    outlet = Outlet(stream)
    os.close(reading)
    for _ in range(100):
        outlet.write("nobody\n")
    outlet.drain(LIMIT_S)
    assert outlet.write("still nobody\n") == 13


def test_only_text(pipe: tuple[int, TextIO]) -> None:
    with pytest.raises(TypeError, match="bytes"):
        Outlet(pipe[1]).write(b"")  # type: ignore[arg-type]


def test_only_pipes_are_replaced(pipe: tuple[int, TextIO], tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(f"{tmp_path}/out", "w") as file:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", pipe[1])
        with never_waiting():
            assert sys.stdout is file
            assert isinstance(sys.stderr, Outlet)
            print("told", file=sys.stderr)
        assert sys.stderr is pipe[1]
        assert os.read(pipe[0], 100) == b"told\n"  # drained
