"""What `ttt-adapt run` leaves when it is stopped: at any moment all that it wrote has the same frames."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import ttt_adapt.evaluation.adapt_video as module
from arm_inputs import checkpoint, write_clip
from command_line import status, video
from ttt_adapt.evaluation.run_outputs import Outputs
from ttt_adapt.tasks.checkpoint import save_checkpoint
from ttt_adapt.video import VideoWriter

PALETTE = ((10, 20, 30), (200, 0, 0), (0, 0, 250))
WRITING = ("run_outputs.py", "film_file.py", "film.py", "writer.py", "label_video.py", "adapt_video.py")
"""Modules in whose lines a signal may come."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_checkpoint(file, checkpoint(palette=PALETTE))
    return file


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """A folder of five pictures whose names are no numbers from 0."""
    root = tmp_path_factory.mktemp("clips") / "clip"
    write_clip(root, 5)
    for index, name in enumerate(("a", "b 1", "b 2", "b 10", "ü")):
        (root / "images" / f"{index}.png").rename(root / "images" / f"{name}.png")
    return root / "images"


# ---- at any moment


@contextmanager
def at_lines(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of each line of the modules that write, before it runs, once the targets are there."""
    count = 0

    def trace(frame, event, _argument):
        nonlocal count
        if os.path.basename(frame.f_code.co_filename) not in WRITING:
            return None
        if event == "line":
            count += 1
            act(count)
        return trace

    def begin(*arguments):
        sys.settrace(trace)
        sys._getframe(1).f_trace = trace
        return Outputs(*arguments)

    before = sys.gettrace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Outputs", begin)
        try:
            yield
        finally:
            sys.settrace(before)


def call_in(folder: Path, frames: Path, model: Path) -> list[object]:
    return [
        "run", frames, f"--checkpoint={model}", "--arm=fixed", "--limit=3", f"--out={folder / 'o.mp4'}",
        f"--labels-out={folder / 'labels'}", f"--raw-out={folder / 'raw'}",
    ]  # fmt: skip


def kept_in(folder: Path) -> set[int]:
    """How many frames each target holds."""
    counts = {video(folder / "o.mp4")[0]} if (folder / "o.mp4").exists() else {0}
    for name, suffix in (("labels", "png"), ("raw", "npz")):
        counts.add(len(list((folder / name).glob(f"*.{suffix}"))))
        if (folder / name / "run.json").exists():
            about = json.loads((folder / name / "run.json").read_text())
            counts.add(about["frames"])
            assert about["complete"] in (False, about["frames"] == 3)
    return counts


def test_at_whatever_line_a_signal_comes_message_film_label_maps_and_raw_outputs_have_the_same_frames(
    model, frames, tmp_path, capsys, monkeypatch
):
    lines = 0

    def count(number: int) -> None:
        nonlocal lines
        lines = number

    for name in ("first", "whole"):  # the first one loads modules
        (tmp_path / name).mkdir()
        with at_lines(count):
            assert status(monkeypatch, *call_in(tmp_path / name, frames, model)) == 0
        assert kept_in(tmp_path / name) == {3}
    capsys.readouterr()
    found = set()
    for moment in np.linspace(lines // 20, lines - 4, 10).astype(int):
        folder = tmp_path / str(moment)
        folder.mkdir()
        with at_lines(lambda number, moment=moment: signal.raise_signal(signal.SIGTERM) if number == moment else None):
            assert status(monkeypatch, *call_in(folder, frames, model)) == 143
        told = capsys.readouterr().err
        (number,) = kept_in(folder)
        assert {int(each) for each in re.findall(r"kept in .*: (\d+) frames? of 3", told)} == ({number} - {0})
        assert told.count("kept in ") == (3 if number else 0)
        if not number:
            assert os.listdir(folder) == []
        found.add(number)
    assert {0, 3} < found


# ---- one after the other


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_a_run_as_ctrl_c_does_and_what_was_written_is_told_as_partial(
    name, code, model, frames, tmp_path, capsys, monkeypatch
):
    number, real = getattr(signal, name), VideoWriter.write
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]

    def write(self, picture):
        real(self, picture)
        if self.count == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(VideoWriter, "write", write)
    out, labels = tmp_path / "o.mp4", tmp_path / "labels"
    call = ["run", frames, f"--checkpoint={model}", "--arm=fixed", f"--out={out}", f"--labels-out={labels}"]
    assert status(monkeypatch, *call) == code
    told = capsys.readouterr().err
    assert f"kept in {out}: 3 frames of 5\n" in told
    assert f"kept in {labels}: 3 frames of 5\n" in told
    assert told.endswith("interrupted\n" if name == "SIGINT" else f"stopped by {name}\n")
    assert video(out)[0] == 3
    about = json.loads((labels / "run.json").read_text())
    assert (about["complete"], about["frames"]) == (False, 3)
    assert {path.name for path in labels.glob("*.png")} == {"a.png", "b 1.png", "b 2.png"}
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == before


def test_an_interrupted_run_that_may_overwrite_leaves_the_old_film_and_says_so_in_plain_words(
    model, frames, tmp_path, capsys, monkeypatch
):
    real, out = VideoWriter.write, tmp_path / "o.mp4"
    out.write_bytes(b"precious")

    def write(self, picture):
        real(self, picture)
        if self.count == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(VideoWriter, "write", write)
    call = ["run", frames, f"--checkpoint={model}", "--arm=fixed", f"--out={out}", "--overwrite"]
    assert status(monkeypatch, *call) == 143
    told = capsys.readouterr().err
    partial = tmp_path / "o.partial.mp4"
    assert f"warning: {out} exists and stays; the 2 new frames are in {partial}.\n" in told
    assert "UserWarning" not in told
    assert out.read_bytes() == b"precious"
    assert video(partial)[0] == 2


def test_a_signal_that_is_ignored_stays_ignored(model, frames, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        real = VideoWriter.write
        monkeypatch.setattr(
            VideoWriter, "write", lambda self, picture: (real(self, picture), signal.raise_signal(signal.SIGHUP))
        )
        call = ["run", frames, f"--checkpoint={model}", "--arm=fixed", f"--out={tmp_path / 'o.mp4'}"]
        assert status(monkeypatch, *call) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert video(tmp_path / "o.mp4")[0] == 5


def test_a_stopped_video_of_labels_has_the_frames_of_the_film_and_an_old_one_stays(
    model, frames, tmp_path, capsys, monkeypatch
):
    real, out, labels = VideoWriter.write, tmp_path / "o.mp4", tmp_path / "labels.mkv"

    def write(self, picture):
        if self.count == 2:
            signal.raise_signal(signal.SIGTERM)
        real(self, picture)

    monkeypatch.setattr(VideoWriter, "write", write)
    call = ["run", frames, f"--checkpoint={model}", "--arm=fixed", f"--out={out}", f"--labels-out={labels}"]
    assert status(monkeypatch, *call) == 143
    assert {video(out)[0], video(labels)[0]} == {3}
    told = capsys.readouterr().err
    assert f"kept in {labels}: 3 frames of 5\n" in told
    before = labels.read_bytes()
    assert status(monkeypatch, *call, "--overwrite") == 143
    partial = tmp_path / "labels.partial.mkv"
    assert f"warning: {labels} exists and stays; the 3 new frames are in {partial}.\n" in capsys.readouterr().err
    assert (labels.read_bytes(), video(partial)[0]) == (before, 3)


def test_a_frame_that_cannot_be_written_is_in_no_folder_and_the_frames_before_it_are_told(
    model, frames, tmp_path, capsys, monkeypatch
):
    real, out, labels = VideoWriter.write, tmp_path / "o.mp4", tmp_path / "labels"

    def write(self, picture):
        if self.count == 2:
            raise OSError("the disk is full")
        real(self, picture)

    monkeypatch.setattr(VideoWriter, "write", write)
    call = ["run", frames, f"--checkpoint={model}", "--arm=fixed", f"--out={out}", f"--labels-out={labels}"]
    assert status(monkeypatch, *call) == 1
    told = capsys.readouterr().err
    assert f"kept in {out}: 2 frames of 5\nkept in {labels}: 2 frames of 5\nerror: the disk is full\n" in told
    assert len(list(labels.glob("*.png"))) == video(out)[0] == 2
    assert json.loads((labels / "run.json").read_text())["frames"] == 2
