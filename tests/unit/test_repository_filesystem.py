"""The folder repository: what is found, what changes, and how one broken model leaves the others alone."""

from __future__ import annotations

import gc
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.config.files import LARGEST_CONFIG_BYTES
from aiorch_server.config.names import check_name, parse_version
from aiorch_server.errors import AiorchError, InternalError, ModelLoadError, RequestError, UnknownModel
from aiorch_server.repository import Artefact, BackendNames, FilesystemRepository, fingerprint, overlay

NAMES = BackendNames({"model.onnx": "onnxruntime"}, {"onnxruntime_onnx": "onnxruntime"})


def make_model(root: Path, name: str = "m", *versions: int, config: str | None = None) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for version in versions:
        (folder / str(version)).mkdir()
        (folder / str(version) / "model.onnx").write_bytes(b"onnx")
    if config is not None:
        (folder / "config.pbtxt").write_text(config)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    return root


@pytest.fixture
def repository(root: Path) -> FilesystemRepository:
    return FilesystemRepository([root])


def test_models_and_versions_are_found(root: Path, repository: FilesystemRepository) -> None:
    make_model(root, "b", 2, 10, 1)
    make_model(root, "a")
    (root / "README.md").write_text("not a model")
    make_model(root, ".hidden", 1)
    for ignored in ("0", "01", "-1", "1.5", "latest", "٣", str(2**63), "warmup"):
        (root / "b" / ignored).mkdir()
    (root / "b" / "7").write_text("a file, not a version")
    found = repository.scan()
    assert list(found) == ["a", "b"]
    assert list(found["b"].versions) == [1, 2, 10]
    assert dict(found["a"].versions) == {}
    assert not any(model.problem for model in found.values())
    assert repository.look("b") == found["b"]
    assert repository.look("c") is None
    assert repository.look("README.md") is None


def test_a_model_is_opened(root: Path, repository: FilesystemRepository) -> None:
    config = 'max_batch_size: 4 output { name: "y" data_type: TYPE_STRING dims: 1 label_filename: "labels.txt" }'
    folder = make_model(root, "m", 3, config=config)
    (folder / "labels.txt").write_text("cat\ndog")
    model = repository.open("m")
    assert model.name == model.config.name == "m"
    assert model.snapshot == repository.look("m")
    assert model.directory == folder
    assert model.declared.max_batch_size == 4
    assert model.declared.outputs[0].labels == ("cat", "dog")
    assert model.locate(3, NAMES) == Artefact(folder / "3" / "model.onnx", "onnxruntime")
    with pytest.raises(ModelLoadError, match="version 4 of model 'm' has no folder"):
        model.locate(4, NAMES)
    model.close()
    model.close()
    assert folder.exists()


# ------------------------------------------------------------------------------------------------------ bad names


@pytest.mark.parametrize("name", ["", ".", "..", "../m", "/etc", "a/b", "a\\b", ".m", "m\0", "m\n", " m", "x" * 256])
def test_names_that_are_not_one_plain_segment_are_refused(repository: FilesystemRepository, name: str) -> None:
    for attempt in (repository.look, repository.open, lambda name: repository.open(name, "{}", {"1/f": b""})):
        with pytest.raises(RequestError, match="is not allowed"):
            attempt(name)


@given(st.text(max_size=12))
def test_an_allowed_name_stays_in_its_folder(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    path = Path("/srv/models") / name
    assert os.path.normpath(path) == str(path)
    assert path.parent == Path("/srv/models")
    assert name.isprintable()


@given(st.one_of(st.text(max_size=8), st.integers().map(str)))
def test_versions_are_positive_decimal_numbers(name: str) -> None:
    version = parse_version(name)
    if version is None:
        assert not (name.isascii() and name.isdecimal() and name[0] != "0" and int(name) < 2**63)
    else:
        assert str(version) == name
        assert 0 < version < 2**63


def test_an_unknown_model_is_unknown(repository: FilesystemRepository) -> None:
    with pytest.raises(UnknownModel, match="'nobody' is not in the model repository"):
        repository.open("nobody")


# ------------------------------------------------------------------------------------- broken models beside good ones


def assert_only_problem(repository: FilesystemRepository, name: str, expected: str) -> None:
    found = repository.scan()
    assert found["good"].problem == ""
    assert list(found["good"].versions) == [1]
    assert expected in found[name].problem
    assert name in found[name].problem
    with pytest.raises(ModelLoadError) as caught:
        repository.open(name)
    assert expected in str(caught.value)
    repository.open("good")


def test_links_that_lead_out_are_problems(root: Path, repository: FilesystemRepository, tmp_path: Path) -> None:
    make_model(root, "good", 1)
    outside = make_model(tmp_path, "outside", 1, config="")
    (root / "link").symlink_to(outside)
    assert_only_problem(repository, "link", "leads out of the repository")
    empty = make_model(tmp_path, "empty", config="max_batch_size: 4")
    (root / "config_alone").symlink_to(empty)
    assert_only_problem(repository, "config_alone", "leads out of the repository")
    make_model(root, "version")
    (root / "version" / "1").symlink_to(outside / "1")
    assert_only_problem(repository, "version", "leads out of the repository")
    make_model(root, "config", 1)
    (root / "config" / "config.pbtxt").symlink_to(outside / "config.pbtxt")
    assert_only_problem(repository, "config", "leads out of the repository")
    make_model(root, "deep", 1)
    (root / "deep" / "1" / "model.savedmodel").mkdir()
    (root / "deep" / "1" / "model.savedmodel" / "variables").symlink_to(outside)
    assert_only_problem(repository, "deep", "leads out of the repository")


def test_an_artefact_that_became_a_link_out_is_refused(
    root: Path, repository: FilesystemRepository, tmp_path: Path
) -> None:
    folder = make_model(root, "m", 1)
    model = repository.open("m")
    (tmp_path / "secret").write_text("x")
    (folder / "1" / "model.onnx").unlink()
    (folder / "1" / "model.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelLoadError, match="leads out of the repository"):
        model.locate(1, NAMES)


def test_links_that_stay_inside_are_followed(root: Path, repository: FilesystemRepository) -> None:
    make_model(root, "m", 1)
    (root / "m" / "2").symlink_to("1")
    (root / "n").symlink_to("m")
    (root / "m" / "1" / "self").symlink_to(".")
    found = repository.scan()
    assert list(found["m"].versions) == list(found["n"].versions) == [1, 2]
    assert repository.open("n").locate(2, NAMES).path == root / "n" / "2" / "model.onnx"


def test_links_in_a_circle_and_to_nothing_are_problems(root: Path, repository: FilesystemRepository) -> None:
    make_model(root, "good", 1)
    (root / "circle").symlink_to("circle")
    (root / "gone").symlink_to("nowhere")
    assert_only_problem(repository, "circle", "cannot be read")
    assert_only_problem(repository, "gone", "cannot be read")


def test_a_root_may_be_a_link_that_is_switched(tmp_path: Path) -> None:
    make_model(tmp_path / "first", "a", 1)
    make_model(tmp_path / "second", "b", 1)
    (tmp_path / "current").symlink_to("first")
    repository = FilesystemRepository([tmp_path / "current"])
    assert list(repository.scan()) == ["a"]
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("second")
    assert list(repository.scan()) == ["b"]


@pytest.mark.parametrize("mistake", ["both", "config.yml"])
def test_configuration_files_in_doubt_are_problems(root: Path, repository: FilesystemRepository, mistake: str) -> None:
    make_model(root, "good", 1)
    folder = make_model(root, "bad", 1)
    for name in ("config.pbtxt", "config.yaml") if mistake == "both" else (mistake,):
        (folder / name).write_text("")
    assert_only_problem(repository, "bad", "config.y")


def test_a_folder_that_cannot_be_read_is_a_problem(
    root: Path, repository: FilesystemRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(root, "good", 1)
    folder = make_model(root, "bad", 1)
    # Root reads folders of any mode, so the refusal comes from the call itself.
    real = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert_only_problem(repository, "bad", "Permission denied")


def test_a_folder_without_end_is_a_problem(
    root: Path, repository: FilesystemRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "MOST_ENTRIES", 3)
    make_model(root, "good", 1)
    for index in range(4):
        (make_model(root, "bad") / f"{index}").mkdir(exist_ok=True)
        (root / "bad" / "1").mkdir(exist_ok=True)
        (root / "bad" / "1" / f"file{index}").write_text("")
    assert_only_problem(repository, "bad", "more than 3 files")


def test_a_bad_configuration_is_told_when_the_model_is_opened(root: Path, repository: FilesystemRepository) -> None:
    make_model(root, "good", 1)
    make_model(root, "bad", 1, config="max_batch_size: -1 runtime: 'x'")
    assert repository.scan()["bad"].problem == ""
    with pytest.raises(ModelLoadError) as caught:
        repository.open("bad")
    assert "config.pbtxt: max_batch_size: found -1" in str(caught.value)
    assert "runtime: not supported" in str(caught.value)


def test_a_name_in_two_roots_is_a_problem_of_that_model(tmp_path: Path) -> None:
    make_model(tmp_path / "a", "twice", 1)
    make_model(tmp_path / "b", "twice", 1)
    make_model(tmp_path / "a", "good", 1)
    make_model(tmp_path / "b", "other", 1)
    repository = FilesystemRepository([tmp_path / "a", tmp_path / "b", tmp_path / "a" / ".." / "a"])
    assert_only_problem(repository, "twice", f"is in more than one repository ({tmp_path / 'a'}, {tmp_path / 'b'})")
    assert repository.scan()["other"].problem == ""


def test_a_root_that_is_gone_is_no_empty_repository(root: Path, repository: FilesystemRepository) -> None:
    root.rmdir()
    for attempt in (repository.scan, lambda: repository.look("m"), lambda: repository.open("m")):
        with pytest.raises(ModelLoadError, match="the model repository cannot be read"):
            attempt()
    root.write_text("a file")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        repository.scan()


# ---------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprints_change_with_what_they_stand_for(root: Path, repository: FilesystemRepository) -> None:
    folder = make_model(root, "m", 1, 2)
    (folder / "1" / "model.savedmodel" / "variables").mkdir(parents=True)
    before = repository.scan()["m"]
    assert repository.scan()["m"] == before

    (folder / "1" / "model.savedmodel" / "variables" / "data").write_text("x")
    after = repository.scan()["m"]
    assert after.versions[1] != before.versions[1]
    assert (after.versions[2], after.fingerprint) == (before.versions[2], before.fingerprint)

    (folder / "config.pbtxt").write_text("max_batch_size: 1")
    last = repository.scan()["m"]
    assert last.versions == after.versions
    assert last.fingerprint != after.fingerprint


def test_a_replaced_file_of_equal_size_and_time_is_a_change(root: Path, repository: FilesystemRepository) -> None:
    folder = make_model(root, "m", 1)
    artefact = folder / "1" / "model.onnx"
    before, status = repository.scan()["m"], artefact.stat()
    (folder / "1" / "new").write_bytes(b"ONNX")
    os.utime(folder / "1" / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (folder / "1" / "new").replace(artefact)
    assert artefact.stat().st_mtime_ns == status.st_mtime_ns
    assert repository.scan()["m"].versions != before.versions


def test_what_loading_leaves_behind_is_no_change(root: Path, repository: FilesystemRepository) -> None:
    folder = make_model(root, "m", 1)
    before = repository.scan()["m"]
    (folder / "1" / "__pycache__").mkdir()
    (folder / "1" / "__pycache__" / "model.pyc").write_text("x")
    (folder / "1" / ".cache").write_text("x")
    assert repository.scan()["m"] == before


# -------------------------------------------------------------------------------------------------- load requests


def test_a_sent_configuration_replaces_the_stored_one_once(root: Path, repository: FilesystemRepository) -> None:
    folder = make_model(root, "m", 1, config="max_batch_size: 4")
    model = repository.open("m", '{"max_batch_size": 2}')
    assert model.config.max_batch_size == 2
    assert model.locate(1, NAMES).path == folder / "1" / "model.onnx"
    assert repository.open("m").config.max_batch_size == 4
    with pytest.raises(ModelLoadError, match="of model 'm' in the load request"):
        repository.open("m", '{"max_batch_size": -1}')
    with pytest.raises(UnknownModel):
        repository.open("n", "{}")


def test_a_sent_configuration_is_as_bounded_as_a_stored_one(root: Path, repository: FilesystemRepository) -> None:
    make_model(root, "m", 1)
    with pytest.raises(ModelLoadError, match=f"is larger than {LARGEST_CONFIG_BYTES} bytes"):
        repository.open("m", '{"name": "' + "x" * LARGEST_CONFIG_BYTES + '"}')


def test_sent_files_are_a_private_folder_that_goes_with_the_model(root: Path, repository: FilesystemRepository) -> None:
    make_model(root, "m", 1)
    files = {"file:7/model.onnx": b"seven", "8/model.savedmodel/saved_model.pb": b"eight"}
    model = repository.open("m", b'{"backend": "onnxruntime"}', files)
    assert list(model.snapshot.versions) == [7, 8]
    artefact = model.locate(7, NAMES)
    assert artefact.path.read_bytes() == b"seven"
    assert root not in artefact.path.parents
    assert stat.S_IMODE(model.directory.parent.stat().st_mode) == 0o700
    assert repository.open("m").locate(1, NAMES).path.read_bytes() == b"onnx"
    with pytest.raises(ModelLoadError):
        model.locate(1, NAMES)
    model.close()
    assert not model.directory.parent.exists()
    model.close()


def test_sent_files_go_when_nobody_holds_them(repository: FilesystemRepository) -> None:
    model = repository.open("new", "{}", {"1/model.onnx": b""})
    base = model.directory.parent
    del model
    gc.collect()
    assert not base.exists()


@pytest.mark.parametrize(
    "path",
    ["model.onnx", "0/f", "x/f", "1/", "1/../f", "1//f", "/1/f", "1/.f", "1/a\\b", "1/" + "a/" * 20 + "f", "../1/f"],
)
def test_sent_paths_that_lead_elsewhere_are_refused(
    repository: FilesystemRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match="file "):
        repository.open("m", "{}", {"1/good": b"", path: b"x"})
    assert set(tmp_path.rglob("*")) == before


def test_sent_files_that_cannot_be_stored_leave_nothing(
    repository: FilesystemRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    attempts: list[tuple[str | None, dict[str, bytes], type[AiorchError]]] = [
        (None, {"1/f": b""}, RequestError),
        ("{", {"1/f": b""}, ModelLoadError),
        ("{}", {"1/f": b"", "1/f/g": b""}, RequestError),
        ("{}", {f"1/{index}": b"" for index in range(overlay.MOST_FILES + 1)}, RequestError),
    ]
    for config, files, error in attempts:
        with pytest.raises(error):
            repository.open("m", config, files)
        assert [each for each in tmp_path.iterdir() if each.name.startswith("aiorch")] == []

    def write_bytes(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(InternalError, match="No space left"):
        repository.open("m", "{}", {"1/f": b""})
    assert [each for each in tmp_path.iterdir() if each.name.startswith("aiorch")] == []
