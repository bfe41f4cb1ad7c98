"""Outputs appear whole or not at all."""

import os
import pathlib
import tempfile

import pytest

from keras_compress.export.files import checked_target
from keras_compress.whole_files import replacing


@pytest.mark.parametrize("name", ["model.xml", "model.onnx", "model"])
def test_known_suffixes_are_accepted_and_leave_no_trace(tmp_path, name):
    assert checked_target(str(tmp_path / name)) == tmp_path / name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.tflite", "model.v2", "model.XML", ""])
def test_unknown_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="Expected one of '.xml' .*Received: path="):
        checked_target(tmp_path / name if name else "")


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing folder"):
        checked_target(tmp_path / "missing" / "model.xml")


def test_a_folder_in_the_way_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.xml").mkdir()
    with pytest.raises(FileExistsError, match="A folder of that name"):
        checked_target(tmp_path / "model.xml")


def test_a_file_in_the_way_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="A file of that name"):
        checked_target(tmp_path / "model")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(PermissionError, match=r"can be written to.*Read-only"):
        checked_target(tmp_path / "model.xml")


def test_a_pair_of_files_takes_its_place(tmp_path):
    target = tmp_path / "model.xml"
    target.write_text("old")
    with replacing(target, ".bin", ".xml") as temporary:
        temporary.write_text("new")
        temporary.with_suffix(".bin").write_text("weights")
        temporary.with_suffix(".scratch").write_text("left behind")
        assert target.read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.xml": "new",
        "model.bin": "weights",
    }


def test_a_directory_takes_the_place_of_another(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["model.xml", "model"])
def test_a_failure_leaves_the_old_output_alone(tmp_path, name):
    target = tmp_path / name
    with replacing(target) as temporary:
        make(temporary, "old")
    with pytest.raises(RuntimeError, match="halfway"), replacing(target) as temporary:
        make(temporary, "new")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == [target]
    assert read(target) == "old"


def test_a_directory_comes_back_when_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    target = tmp_path / "model"
    make(target, "old")
    replace = os.replace

    def replace_all_but_the_new_one(source, destination):
        if pathlib.Path(source).name == "model" and pathlib.Path(destination) == target:
            raise OSError("disk trouble")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", replace_all_but_the_new_one)
    with pytest.raises(OSError, match="disk trouble"), replacing(target) as temporary:
        make(temporary, "new")
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def make(path, text):
    if path.suffix:
        path.write_text(text)
    else:
        path.mkdir()
        (path / "content").write_text(text)


def read(path):
    return path.read_text() if path.suffix else (path / "content").read_text()
