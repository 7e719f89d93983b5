"""What is on disk while a film is being written, and when its process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from ttt_adapt.errors import VideoError
from ttt_adapt.video import VideoWriter

FRAMES = 40
WRITE = f"""
import os, sys
import numpy as np
from ttt_adapt.video import VideoWriter
writer = VideoWriter(sys.argv[1], 25)
for index in range({FRAMES}):
    writer.write(np.full((48, 64, 3), 6 * index, np.uint8))
os.kill(os.getpid(), int(sys.argv[2]))
"""


def levels(path: Path) -> list[float]:
    """The mean of every frame that a player shows."""
    with av.open(str(path)) as film:
        assert film.streams.video[0].average_rate == 25
        return [frame.to_ndarray(format="rgb24").mean() for frame in film.decode(video=0)]


@pytest.mark.parametrize(
    ("suffix", "number"),
    [(".mp4", signal.SIGKILL), (".mkv", signal.SIGKILL), (".mov", signal.SIGTERM), (".mp4", signal.SIGHUP)],
)
def test_a_killed_process_leaves_a_film_that_plays_and_its_name_says_that_it_is_partial(tmp_path, suffix, number):
    call = [sys.executable, "-c", WRITE, str(tmp_path / f"out{suffix}"), str(int(number))]
    assert subprocess.run(call, check=False).returncode == -number
    assert os.listdir(tmp_path) == [f"out.partial{suffix}"]
    found = levels(tmp_path / f"out.partial{suffix}")
    assert FRAMES - 4 <= len(found) <= FRAMES
    assert found == pytest.approx([6 * index for index in range(len(found))], abs=4)


def test_a_film_can_be_watched_while_it_is_written_and_is_then_replaced_by_the_whole_one(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", 25) as writer:
        for index in range(20):
            writer.write(np.full((48, 64, 3), 6 * index, np.uint8))
        assert os.listdir(tmp_path) == ["out.partial.mp4"]
        assert len(levels(tmp_path / "out.partial.mp4")) >= 16
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert len(levels(tmp_path / "out.mp4")) == 20


def test_the_partial_films_of_earlier_runs_stay(tmp_path):
    (tmp_path / "out.partial.mp4").write_bytes(b"precious")
    with VideoWriter(tmp_path / "out.mp4", 25) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        assert (tmp_path / "out.partial-2.mp4").is_file()
    assert sorted(os.listdir(tmp_path)) == ["out.mp4", "out.partial.mp4"]
    assert (tmp_path / "out.partial.mp4").read_bytes() == b"precious"


def test_a_film_that_cannot_be_finished_stays_under_its_partial_name(tmp_path):
    with pytest.raises(VideoError, match=r"cannot be finished.* can be played: .*out\.partial\.mp4"):  # noqa: PT012, SIM117
        with VideoWriter(tmp_path / "out.mp4", 25) as writer:
            for _ in range(5):
                writer.write(np.zeros((48, 64, 3), np.uint8))
            (tmp_path / "out.mp4").mkdir()
    assert writer.path == tmp_path / "out.partial.mp4"
    assert not writer.finished
    assert len(levels(writer.path)) == 5


@pytest.mark.parametrize("name", ["take:1.mp4", "pipe:1.mkv", "50%d.mp4", "a b?.mov"])
def test_any_name_is_the_name_of_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with VideoWriter(name, 25) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
    assert os.listdir(tmp_path) == [name]
    assert len(levels(tmp_path / name)) == 1
