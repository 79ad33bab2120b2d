"""Uploads: whole, cut off and gone on with, refused, of any size in little memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from aiorch_client import ClientError, RequestError, ServerError
from aiorch_client.admin import AdminClient, AsyncAdminClient, Provenance, TensorSignature
from aiorch_client.admin.archive import PIECE_BYTES
from aiorch_client.retry import RetryPolicy
from cutting_proxy import cutting
from scripted_admin import STATUS, Refusal, ScriptedAdmin

HASTE = RetryPolicy(max_attempts=4, initial_backoff_s=0.02, max_backoff_s=0.1)
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of 8 MB."""
    source = tmp_path / "digits"
    source.mkdir()
    (source / "model.onnx").write_bytes(bytes(range(256)) * (8 * MIB // 256))
    (source / "config.pbtxt").write_bytes(b"max_batch_size: 8")
    return source


def test_a_folder_becomes_a_version(server: ScriptedAdmin, client: AdminClient, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    inputs = (TensorSignature("x", "FP32", (-1, 64)),)
    provenance = Provenance(inputs=inputs, metrics={"accuracy": 0.98}, data_hash="sha256:1", git_commit="c")
    version = client.push(
        "digits", folder, aliases=["prod"], provenance=provenance, progress=lambda *each: told.append(each)
    )
    assert (version.model, version.version, version.aliases) == ("digits", 1, ("prod",))
    assert [(file.path, file.size_bytes) for file in version.files] == [("config.pbtxt", 17), ("model.onnx", 8 * MIB)]
    assert version.files[1].sha256 == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert version.provenance.framework == "onnxruntime", "from the file's name"
    assert version.provenance.git_commit == "c"
    assert (version.provenance.metrics, version.provenance.inputs) == ({"accuracy": 0.98}, inputs)
    sizes = [sent for sent, _ in told]
    assert sizes == sorted(sizes) and sizes[-1] == version.size_bytes == told[0][1]
    assert len(told) == -(-version.size_bytes // PIECE_BYTES)
    header = server.requests["UploadVersion"][0]
    assert header.create_model and header.idempotency_key and header.upload_id
    assert client.push("digits", folder / "model.onnx").version == 2, "each push is a version of its own"


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_cut_connection_is_gone_on_with(server: ScriptedAdmin, folder: Path, is_async: bool) -> None:
    places = [2 * MIB, 4 * MIB, 6 * MIB]
    with cutting(server.url) as proxy:

        def cut(received: int) -> None:
            if proxy.n_cut < 3 and received >= places[proxy.n_cut]:
                proxy.cut()

        server.on_received = cut
        if is_async:
            async with AsyncAdminClient(proxy.target, retry=HASTE) as client:
                version = await client.push("digits", folder)
        else:
            with AdminClient(proxy.target, retry=HASTE) as blocking:
                version = blocking.push("digits", folder)
        assert proxy.n_cut == 3
    headers = server.requests["UploadVersion"]
    offsets = [header.offset for header in headers]
    assert len(offsets) == 4
    assert all(offset >= place for offset, place in zip(offsets, [0, *places], strict=True)), offsets
    assert len({(header.upload_id, header.idempotency_key, header.sha256) for header in headers}) == 1
    assert hashlib.sha256(server.uploads[headers[0].upload_id].content).hexdigest() == headers[0].sha256
    assert version.version == 1 and len(server.versions["digits"]) == 1


def test_a_lost_answer_is_found(server: ScriptedAdmin, client: AdminClient, folder: Path) -> None:
    server.refusals["UploadVersion"].append(Refusal(STATUS.UNAVAILABLE, "cut", is_late=True))
    assert client.push("digits", folder).version == 1
    assert len(server.requests["UploadVersion"]) == 1
    assert len(server.versions["digits"]) == 1


def test_another_process_goes_on(server: ScriptedAdmin, folder: Path) -> None:
    """The first one gave up; the second names the same upload and sends what is missing."""
    with cutting(server.url) as proxy, AdminClient(proxy.target, retry=HASTE) as client:
        server.on_received = lambda received: proxy.close() if received >= 2 * MIB else None
        with pytest.raises(ClientError) as raised:
            client.push("digits", folder, upload_id="mine")
        assert raised.value.code is STATUS.UNAVAILABLE
    received = len(server.uploads["mine"].content)
    assert 2 * MIB <= received < 8 * MIB
    with AdminClient(server.url) as client:
        assert client.get_upload("digits", "mine").received_bytes == received
        version = client.push("digits", folder, upload_id="mine")
        assert server.requests["UploadVersion"][-1].offset == received
        assert client.push("digits", folder, upload_id="mine") == version, "and once it is done, finds it done"
    assert len(server.versions["digits"]) == 1


def test_an_earlier_stream_that_is_not_over_is_waited_for(
    server: ScriptedAdmin, client: AdminClient, folder: Path
) -> None:
    server.refusals["UploadVersion"].extend([Refusal(STATUS.ABORTED, "is being written", "CONFLICT")] * 2)
    assert client.push("digits", folder).version == 1


def test_what_is_refused_is_not_sent_again(server: ScriptedAdmin, client: AdminClient, folder: Path) -> None:
    server.refusals["UploadVersion"].append(Refusal(STATUS.RESOURCE_EXHAUSTED, "too large", "PAYLOAD_TOO_LARGE"))
    with pytest.raises(RequestError, match="too large") as raised:
        client.push("digits", folder)
    assert raised.value.reason == "PAYLOAD_TOO_LARGE"
    server.refusals["UploadVersion"].append(Refusal(STATUS.DATA_LOSS, "checksum", is_late=True))
    with pytest.raises(ServerError, match="checksum"):
        client.push("digits", folder)
    server.refusals["UploadVersion"].extend([Refusal(STATUS.UNAVAILABLE, "the disk is full")] * 20)
    with pytest.raises(ClientError, match="the disk is full"):
        client.push("digits", folder)


@pytest.mark.parametrize("is_async", [False, True])
async def test_files_that_change_while_they_are_sent(server: ScriptedAdmin, folder: Path, is_async: bool) -> None:
    def shrink(sent: int, total: int) -> None:
        (folder / "model.onnx").write_bytes(b"short")

    with pytest.raises(RequestError, match=r"model\.onnx' became shorter while it was read"):
        if is_async:
            async with AsyncAdminClient(server.url) as client:
                await client.push("digits", folder, progress=shrink)
        else:
            with AdminClient(server.url) as blocking:
                blocking.push("digits", folder, progress=shrink)
    assert not server.versions["digits"]


async def test_a_refusal_while_pieces_are_sent_is_told_in_the_servers_words(
    server: ScriptedAdmin, folder: Path
) -> None:
    async with AsyncAdminClient(server.url, retry=HASTE) as client:
        for _ in range(10):
            server.refusals["UploadVersion"].append(
                Refusal(STATUS.RESOURCE_EXHAUSTED, "too large", "PAYLOAD_TOO_LARGE")
            )
            with pytest.raises(RequestError, match="too large") as raised:
                await client.push("digits", folder)
            assert raised.value.reason == "PAYLOAD_TOO_LARGE"


def test_a_progress_that_fails_ends_the_upload(server: ScriptedAdmin, client: AdminClient, folder: Path) -> None:
    def fail(sent: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.push("digits", folder, progress=fail)
    assert not server.versions["digits"]


def test_closing_ends_an_upload(server: ScriptedAdmin, folder: Path) -> None:
    with AdminClient(server.url) as client:

        def close(sent: int, total: int) -> None:
            threading.Thread(target=client.close).start()
            client._closed.wait(10)

        with pytest.raises(RequestError, match="closed"):
            client.push("digits", folder, progress=close)


def test_little_memory(server: ScriptedAdmin, tmp_path: Path) -> None:
    """200 MB through a process that may grow by 40 MB."""
    big = tmp_path / "model.onnx"
    piece = bytes(range(256)) * 4096
    with big.open("wb") as file:
        for _ in range(200):
            file.write(piece)
    server.keeps_content = False
    program = """
        import resource, sys
        from aiorch_client.admin import AdminClient
        with AdminClient(sys.argv[1]) as client:
            client.who_am_i()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert client.push("big", sys.argv[2]).size_bytes > 200 << 20
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), server.url, str(big)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 << 10, f"grew by {done.stdout} KiB"
