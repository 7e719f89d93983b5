"""Natural order, which files count, and files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ttt_adapt.errors import ConfigError
from ttt_adapt.files import PICTURE_SUFFIXES, atomic_write, files_in, folders_in, natural_key, output_folder


def test_natural_order_compares_every_number_in_a_name():
    names = ["a2b10", "a10b1", "2", "a2b9", "b", "10", "a"]
    assert sorted(names, key=natural_key) == ["2", "10", "a", "a2b9", "a2b10", "a10b1", "b"]


def test_leading_zeros_do_not_count_and_capitals_do():
    assert natural_key("frame_007") == natural_key("frame_7")
    assert natural_key("Frame") < natural_key("frame")


def test_files_and_folders_come_in_natural_order_without_hidden_ones(tmp_path):
    for name in ("10.png", "9.PNG", "notes.txt", ".8.png", "b.jpg"):
        (tmp_path / name).touch()
    for name in ("clip10", "clip9", ".cache", "7.png"):
        (tmp_path / name).mkdir()
    assert [file.name for file in files_in(tmp_path, PICTURE_SUFFIXES)] == ["9.PNG", "10.png", "b.jpg"]
    assert [folder.name for folder in folders_in(tmp_path)] == ["7.png", "clip9", "clip10"]


def test_a_file_is_there_when_it_is_complete_with_ordinary_permissions(tmp_path):
    path = tmp_path / "a.json"
    with atomic_write(path) as part:
        part.write_text("new")
        assert not path.exists()
    (tmp_path / "plain").touch()
    assert path.read_text() == "new"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.json", "plain"]


@pytest.mark.parametrize("writes", [True, False])
def test_a_block_that_fails_leaves_the_old_file_and_no_other(tmp_path, writes):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as part:
            if writes:
                part.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_relative_name_is_written_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_write("a.json") as part:
        part.write_text("new")
    assert Path("a.json").read_text() == "new"


def test_a_folder_for_results_is_made_or_refused_before_anything_is_computed(tmp_path):
    output_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder that can be written to"):
        output_folder(tmp_path / "file")
