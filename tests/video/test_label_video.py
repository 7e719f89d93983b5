"""Label maps as a video: every id is read back as it was written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, StateError, VideoError
from ttt_adapt.video import LabelVideoWriter, open_video

av = pytest.importorskip("av", reason='needs PyAV: pip install "ttt-adapt[video]"')


def read(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@pytest.mark.parametrize("size", [(48, 64), (33, 47), (1, 1), (3, 700)])
@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16)])
def test_every_id_of_every_pixel_is_read_back(tmp_path, size, classes, dtype):
    random = np.random.default_rng(0)
    written = [random.integers(0, classes, size) for _ in range(4)]
    written[1][0, 0], written[2][-1, -1] = 0, classes - 1
    with LabelVideoWriter(tmp_path / "l.mkv", 30000 / 1001, classes) as writer:
        for labels in written:
            writer.write(labels)
    found = read(tmp_path / "l.mkv")
    assert {labels.dtype for labels in found} == {np.dtype(dtype)}
    assert all(np.array_equal(*pair) for pair in zip(found, written, strict=True))


def test_every_frame_stands_alone_and_the_file_says_what_it_is(tmp_path):
    about = {"classes": ["sky", "röad"], "palette": [[1, 2, 3], [4, 5, 6]], "source": "a b.mp4"}
    with LabelVideoWriter(tmp_path / "l.mkv", None, 2, about) as writer:
        for index in range(5):
            writer.write(np.full((8, 8), index % 2, np.int64))
    with av.open(str(tmp_path / "l.mkv")) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
        assert container.streams.video[0].average_rate == 25
        assert json.loads(container.metadata["CLASSES"]) == about["classes"]
        assert json.loads(container.metadata["PALETTE"]) == about["palette"]
        assert container.metadata["SOURCE"] == "a b.mp4"
    with open_video(tmp_path / "l.mkv") as film:  # a player shows the ids as greys
        assert [int(frame.max()) for frame in film] == [0, 1, 0, 1, 0]


def test_what_is_no_label_map_is_refused_and_the_frames_before_stay_whole(tmp_path):
    with LabelVideoWriter(tmp_path / "l.mkv", 25, 3) as writer:
        writer.write(np.ones((4, 6), np.uint8))
        for labels, error, match in (
            (np.ones((4, 6)), FrameTypeError, "float64 array, expected a NumPy array of integers"),
            ([[1]], FrameTypeError, "are a list"),
            (np.ones((4, 6, 3), int), FrameError, r"shape \[4, 6, 3\], expected \[H, W\]"),
            (np.ones((6, 4), int), FrameError, r"shape \[6, 4\], expected \[4, 6\]"),
            (np.full((4, 6), 3), FrameError, "ids from 3 to 3, expected 0 to 2"),
            (np.full((4, 6), -1), FrameError, "ids from -1 to -1, expected 0 to 2"),
        ):
            with pytest.raises(error, match=match):
                writer.write(labels)
    assert [labels.tolist() for labels in read(tmp_path / "l.mkv")] == [[[1] * 6] * 4]
    with pytest.raises(StateError, match="is closed"):
        writer.write(np.ones((4, 6), np.uint8))


def test_what_cannot_be_a_video_of_labels_is_refused_before_anything_is_there(tmp_path):
    with pytest.raises(ConfigError, match=r"suffix '.mp4', expected .mkv"):
        LabelVideoWriter(tmp_path / "l.mp4", 25, 3)
    for classes in (0, 65537):
        with pytest.raises(ConfigError, match="expected 1 to 65536"):
            LabelVideoWriter(tmp_path / "l.mkv", 25, classes)
    with pytest.raises(VideoError, match="does not exist"):
        LabelVideoWriter(tmp_path / "none" / "l.mkv", 25, 3)
    assert os.listdir(tmp_path) == []


def test_a_killed_process_leaves_all_frames_but_the_last_few_under_a_partial_name(tmp_path):
    code = f"""
import os, signal, sys
import numpy as np
from ttt_adapt.video import LabelVideoWriter
writer = LabelVideoWriter(sys.argv[1], 25, 40)
for index in range(20):
    writer.write(np.full((48, 64), index))
os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    call = [sys.executable, "-c", code, str(tmp_path / "l.mkv")]
    assert subprocess.run(call, check=False).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["l.partial.mkv"]
    found = [int(labels.max()) for labels in read(tmp_path / "l.partial.mkv")]
    assert found == list(range(len(found)))
    assert len(found) >= 18
