"""Natural order, which files count, and files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ttt_adapt.errors import ConfigError
from ttt_adapt.files import (
    PICTURE_SUFFIXES,
    atomic_write,
    check_place,
    files_in,
    folders_in,
    natural_key,
    output_folder,
)


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
    output_folder(tmp_path / "a", folder=True)
    output_folder(tmp_path / "b" / "model.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    (tmp_path / "file").touch()
    for name in ("file/c", "file/c/d"):
        with pytest.raises(ConfigError, match="no folder"):
            output_folder(tmp_path / name, folder=True)
    with pytest.raises(ConfigError, match="file is no folder that can be written to"):
        output_folder(tmp_path / "file" / "c.json")


def test_a_slip_in_a_path_makes_no_tree_of_folders_and_the_missing_folder_is_named(tmp_path):
    (tmp_path / "data set").mkdir()
    for check in (check_place, output_folder):
        for path, folder in (("data sett/run 1/labels", True), ("data sett/run 1/m.safetensors", False)):
            target = tmp_path / path
            with pytest.raises(ConfigError) as raised:
                check(target, "labels_out", folder=folder)
            above = target.parent if folder else target.parent.parent
            absent = tmp_path / "data sett"
            assert str(raised.value) == (
                f"labels_out is {target}, and there is no folder {absent}: mend the path, or make it with mkdir -p "
                f"'{above}'"
            )
    assert os.listdir(tmp_path) == ["data set"]


def test_a_place_is_checked_without_changing_anything(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    check_place(tmp_path / "new" / "m.safetensors")
    check_place(tmp_path / "new", folder=True)
    check_place(tmp_path / "file")
    check_place(Path("m.safetensors"))
    with pytest.raises(ConfigError, match="out is .*file, a file; expected a folder"):
        check_place(tmp_path / "file", folder=True)
    with pytest.raises(ConfigError, match="out is .*folder, a folder; expected the name of a file"):
        check_place(tmp_path / "folder")
    with pytest.raises(ConfigError, match="a name that is too long for this disk: choose a shorter one"):
        check_place(tmp_path / ("m" * 250 + ".mp4"))
    with pytest.raises(ConfigError, match="/proc is no folder that can be written to"):
        check_place(Path("/proc/m.safetensors"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
