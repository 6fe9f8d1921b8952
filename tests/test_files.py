"""Whole or absent."""

from __future__ import annotations

import os

import pytest

from diffmtl_fast._files import TEMPORARY_PREFIX, remove, remove_leftovers, replacing


def test_a_file_is_replaced_whole(tmp_path):
    target = tmp_path / "a.txt"
    for text in ("old", "new"):
        with replacing(target) as aside:
            assert aside.suffix == ".txt"
            aside.write_text(text)
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "folder"
    for name in ("old", "new"):
        with replacing(target) as aside:
            aside.mkdir()
            (aside / name).touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failure_leaves_the_old_one(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(target) as aside:  # noqa: PT012
        aside.write_text("half")
        (tmp_path / "missing").read_text()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / f"{TEMPORARY_PREFIX}1-folder").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}1-folder" / "part").touch()
    (tmp_path / f"{TEMPORARY_PREFIX}1-file").touch()
    (tmp_path / "kept").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    remove(tmp_path / "kept")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_and_a_device_stay_what_they_are(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to("/dev/null")
    with pytest.raises(ValueError, match="found a device, pipe or socket"), replacing(target):
        raise AssertionError("not reached")
    assert not target.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
