"""What a newcomer gets wrong: each message names what was typed and what was expected, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_inputs import SIZE, checkpoint, write_clip
from command_line import fail, invoke, video
from ttt_adapt.cli.language import with_option
from ttt_adapt.tasks.checkpoint import save_checkpoint
from ttt_adapt.video import VideoWriter


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with a model, clips, videos and things that are none of these."""
    root = tmp_path_factory.mktemp("room")
    save_checkpoint(root / "m.safetensors", checkpoint())
    write_clip(root / "clips" / "a", 2)
    for name, count in (("one.mp4", 1), ("v.mp4", 3)):
        with VideoWriter(root / name, 25) as writer:
            for index in range(count):
                writer.write(np.full((*SIZE, 3), 40 * index, np.uint8))
    (root / "zero.mp4").write_bytes(b"")
    (root / "notes.txt").write_text("hello")
    (root / "empty").mkdir()
    (root / "mixed").mkdir()
    Image.new("RGB", SIZE[::-1]).save(root / "mixed" / "a.png")
    (root / "mixed" / "v.mp4").write_bytes((root / "v.mp4").read_bytes())
    return root


def everything(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


MODEL = ("--checkpoint", "m.safetensors")
FIXED = (*MODEL, "--arm", "fixed")
SLIPS = [
    (
        ("run", "m.safetensors", "--checkpoint", "v.mp4"),
        "--checkpoint: v.mp4 is no checkpoint written by ttt_adapt: it is a video",
    ),
    (
        ("run", "v.mp4", "--checkpoint", "v.mp4"),
        "--checkpoint: v.mp4 is no checkpoint written by ttt_adapt: it is a video",
    ),
    (
        ("run", "v.mp4", "--checkpoint", "clips"),
        "--checkpoint: clips is no checkpoint written by ttt_adapt: it is a folder",
    ),
    (("run", "v.mp4", "--checkpoint", "m.safetensor"), "--checkpoint: there is no checkpoint m.safetensor: train one"),
    (("run", "m.safetensors", *FIXED), "m.safetensors is a file of weights; expected a video, a picture, or a folder"),
    (("run", "zero.mp4", *FIXED), "zero.mp4 is empty (0 bytes): copy or record it anew"),
    (("run", "notes.txt", *FIXED), "notes.txt cannot be opened as a video"),
    (("run", "empty", *FIXED), "empty holds no images. Known suffixes"),
    (("run", "clips", *FIXED), "clips holds no images. There are some in clips/a/images: pass that folder"),
    (("run", "v.mp4", *FIXED, "--out", "o.avi"), "--out is o.avi, with the suffix '.avi'; expected the name of a film"),
    (("run", "v.mp4", *FIXED, "--out", "film"), "--out is film, without a suffix; expected the name of a film"),
    (("run", "v.mp4", *FIXED, "--out", "clips"), "--out is clips, a folder; expected the name of a film"),
    (("run", "v.mp4", *FIXED, "--out", "x/y/o.mp4"), "--out is x/y/o.mp4, and there is no folder x: mend the path, or"),
    (
        ("run", "v.mp4", *FIXED, "--labels-out", "x/l"),
        "--labels-out is x/l, and there is no folder x: mend the path, or",
    ),
    (
        ("run", "v.mp4", *FIXED, "--labels-out", "x/y/l.mkv", "--raw-out", "r"),
        "--labels-out is x/y/l.mkv, and there is",
    ),
    (("run", "v.mp4", *FIXED, "--raw-out", "x/y/r"), "--raw-out is x/y/r, and there is no folder x: mend the path, or"),
    (
        ("run", "v.mp4", *FIXED, "--labels-out", "/proc/l"),
        "--labels-out is /proc/l, and /proc/l is no folder that can be",
    ),
    (("run", "v.mp4", *FIXED, "--labels-out", "notes.txt"), "--labels-out is notes.txt, a file; expected a folder"),
    (("run", "v.mp4", *FIXED, "--size", "64*96"), "--size is '64*96'; expected HEIGHTxWIDTH, such as 144x192"),
    (
        ("run", "v.mp4", *FIXED, "--size", "99999x99999"),
        "--size is '99999x99999'; expected HEIGHTxWIDTH in pixels, each",
    ),
    (("run", "v.mp4", *MODEL, "--arm", "fixd"), "--arm: there is no arm 'fixd'; nearest: 'fixed'"),
    (("run", "v.mp4", *MODEL, "--preset", "fast"), "--preset: there is no preset 'fast'; expected one of online"),
    (("run", "v.mp4", *MODEL, "--set", "lr=-1"), "--set lr=-1: lr is -1; expected a number of at least 0"),
    (("run", "v.mp4", *MODEL, "--branch", "mask_ratio=2"), "--branch mask_ratio=2: mask_ratio is 2; expected a number"),
    (("run", "v.mp4", *MODEL, "--branch", "foo=2"), "--branch foo=2: 'foo' cannot change after attaching"),
    (
        ("run", "v.mp4", *FIXED, "--device", "gpu"),
        "--device is 'gpu', which cannot be used here (there is no such kind)",
    ),
    (("run", "v.mp4", *FIXED, "--task", "depth"), "--task: there is no task 'depth'; nearest: 'segmentation'"),
    (
        ("train", "clips", "--out", "x/y/m.safetensors"),
        "--out is x/y/m.safetensors, and there is no folder x: mend the",
    ),
    (
        ("train", "clips", "--out", "n.safetensors", "--classes", "notes.txt"),
        "--classes is 'notes.txt', a file; expected the",
    ),
    (("calibrate", "m.safetensors", "clips", "--out", "x/y/m.safetensors"), "and there is no folder x: mend the path"),
    (("eval", "clips", *MODEL, "--out", "x/eval"), "--out is x/eval, and there is no folder x: mend the path, or make"),
    (
        ("demo", "--out", "x/demo"),
        "--out is x/demo, and there is no folder x: mend the path, or make it with mkdir -p x",
    ),
    (("demo", "--out", "notes.txt"), "--out is notes.txt, a file; expected a folder"),
]


@pytest.mark.parametrize(("call", "told"), SLIPS, ids=lambda value: str(value)[-50:])
def test_a_slip_is_told_as_it_was_typed_and_nothing_is_written(call, told, room, capsys, monkeypatch):
    monkeypatch.chdir(room)
    before = everything(room)
    line = fail(capsys, monkeypatch, *call)
    assert told in line
    assert everything(room) == before


def test_a_target_that_fits_makes_one_folder(room, tmp_path, monkeypatch):
    monkeypatch.chdir(room)
    for option, name in (("--out", "new/o.mp4"), ("--labels-out", "labels"), ("--labels-out", "other/l.mkv")):
        invoke("run", "v.mp4", *FIXED, option, tmp_path / name)
        assert (tmp_path / name).exists()
    assert sorted(os.listdir(tmp_path)) == ["labels", "new", "other"]


def test_a_video_of_one_frame_is_a_film_of_one_frame(room, tmp_path, monkeypatch):
    monkeypatch.chdir(room)
    invoke("run", "one.mp4", *FIXED, "--out", tmp_path / "o.mp4", "--labels-out", tmp_path / "l.mkv")
    assert video(tmp_path / "o.mp4")[0] == video(tmp_path / "l.mkv")[0] == 1
    assert video(tmp_path / "l.mkv")[1] == 25


def test_videos_beside_pictures_are_said_to_be_left_out(room, tmp_path, monkeypatch):
    monkeypatch.chdir(room)
    told = invoke("run", "mixed", *FIXED, "--out", tmp_path / "o.mp4")
    assert "mixed holds 1 picture and 1 video, such as v.mp4: the pictures are the frames; name a video itself" in told
    assert video(tmp_path / "o.mp4")[0] == 1


# ---- the option in front of a message


@pytest.mark.parametrize(
    ("text", "typed", "told"),
    [
        ("there is no arm 'fixd'", {"--arm": ["fixd"]}, "--arm"),
        ("there is no arm 'b'", {"--arms": ["a, b"], "--seed": ["3"]}, "--arms"),
        ("no clip 'c' in d", {"--clips": ["a,c"]}, "--clips"),
        ("m.pt is broken", {"--init": ["m.pt"]}, "--init"),
        ("lr is -1", {"--set": ["window=3", "lr=-1"]}, "--set lr=-1"),
        ("there is no field 'windw'", {"--set": ["windw=3"]}, "--set windw=3"),
        ("b.mp4 after a.mp4", {"--x": ["a.mp4"], "--y": ["b.mp4"]}, "--y"),
        ("batch_size is 3, window is 3", {"--frames": ["3"], "--seed": ["3"]}, ""),
        ("a/m.pt is broken", {"--init": ["m.pt"]}, ""),
        ("--size is 'm.pt'", {"--init": ["m.pt"]}, ""),
        ("the video breaks", {"--view": ["panels"]}, ""),
        ("a run has window=3", {"--set": ["window=3"]}, ""),
    ],
)
def test_a_message_about_a_typed_value_begins_with_its_option(text, typed, told):
    assert with_option(text, typed) == (f"{told}: {text}" if told else text)
