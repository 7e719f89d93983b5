"""A folder with labels beside its frames streams the frames alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ttt_adapt.data import LabelledClip, open_frames
from ttt_adapt.errors import VideoError
from ttt_adapt.video import open_video
from ttt_adapt.video.labels_beside import frame_folder, frames_and_labels

Image = pytest.importorskip("PIL.Image", reason='needs Pillow: pip install "ttt-adapt[video]"')


def save(folder: Path, *names: str, value: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.full((24, 32, 3), value, np.uint8)).save(folder / name)


LAYOUTS = {
    "same stem": ("{}.jpg", "{}.png"),
    "same stem, other photographs": ("{}.jfif", "{}.png"),
    "same stem, WebP": ("{}.webp", "{}.png"),
    "same stem, GIF masks": ("{}.jpg", "{}.gif"),
    "same stem, TIFF frames": ("{}.tif", "{}.png"),
    "CamVid": ("{}.png", "{}_L.png"),
    "Cityscapes": ("{}_leftImg8bit.png", "{}_gtFine_labelIds.png"),
    "Cityscapes, train ids": ("{}_leftImg8bit.png", "{}_gtFine_labelTrainIds.png"),
    "Cityscapes, colours": ("{}_leftImg8bit.png", "{}_gtFine_color.png"),
    "label ids": ("{}.png", "{}_labelIds.png"),
    "masks": ("{}.jpg", "{}_mask.png"),
    "masks of satellites": ("{}_sat.jpg", "{}_mask.png"),
    "watershed masks": ("{}_endo.png", "{}_endo_watershed_mask.png"),
    "segmentations": ("{}.bmp", "{}-seg.bmp"),
    "truth": ("{}_rgb.png", "{}.gt.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_beside_their_frames_are_left_out_and_this_is_said(tmp_path, layout):
    frame, label = LAYOUTS[layout]
    for index in range(3):
        save(tmp_path / "clip", frame.format(f"f{index}"))
        save(tmp_path / "clip", label.format(f"f{index}"), value=3)
    with pytest.warns(UserWarning, match=r"clip: 3 pictures such as f0.* lie beside frames as their labels"):
        video = open_video(tmp_path / "clip")
    assert video.length == 3
    assert [round(float(shown.mean()), -1) for shown in video] == [100, 100, 100]
    (album,) = open_frames(tmp_path / "clip")
    assert [round(float(shown.mean()), -1) for shown, _ in album] == [100, 100, 100]


@pytest.mark.parametrize(
    "names",
    [
        ["left_L.png", "right_R.png"],
        ["a.png", "ball.png", "a1.png"],
        ["mask.png", "labels.png", "L.png"],
        ["a_L.png", "b_L.png"],
        ["scene_mask.jpg", "scene2.jpg"],
        ["a.jpg", "b.png", "c.bmp"],
    ],
)
def test_frames_whose_names_only_look_like_labels_are_kept(tmp_path, names, recwarn):
    save(tmp_path, *names)
    with open_video(tmp_path) as video:
        assert video.length == len(names)
    assert [warning for warning in recwarn if "labels" in str(warning.message)] == []


def test_frames_and_labels_keep_their_order():
    files = [Path(name) for name in ("b.jpg", "b.png", "a_L.png", "a.png", "c.png")]
    frames, labels = frames_and_labels(files)
    assert [file.name for file in frames] == ["b.jpg", "a.png", "c.png"]
    assert [file.name for file in labels] == ["b.png", "a_L.png"]


@pytest.mark.parametrize("frames", ["images", "frames", "rgb", "Frames"])
@pytest.mark.parametrize("labels", ["labels", "masks", "Annotations", "SegmentationClass"])
def test_of_a_clip_with_folders_of_frames_and_labels_the_frames_are_streamed(tmp_path, frames, labels):
    save(tmp_path / "clip" / frames, "0.png", "1.png")
    save(tmp_path / "clip" / labels, "0.png", "1.png", value=3)
    with open_video(tmp_path / "clip") as video:
        assert (video.name, video.length) == ("clip", 2)
        assert [int(frame.mean()) for frame in video] == [100, 100]


def test_the_frames_of_a_labelled_clip_are_those_that_are_streamed(tmp_path):
    for index in range(2):
        save(tmp_path / "clip", f"{index}.jpg", value=60 * index)
        Image.fromarray(np.full((24, 32), index, np.uint8)).save(tmp_path / "clip" / f"{index}.png")
    clip = LabelledClip(tmp_path / "clip", classes=["a", "b"])
    with pytest.warns(UserWarning, match="2 pictures"):
        streamed = list(open_video(tmp_path / "clip"))
    assert len(streamed) == len(clip) == 2
    for shown, (frame, _) in zip(streamed, clip, strict=True):
        np.testing.assert_array_equal(shown, frame)


def test_a_folder_of_labels_that_is_named_is_read(tmp_path):
    save(tmp_path / "labels", "0.png", value=3)
    assert [int(frame.mean()) for frame in open_video(tmp_path / "labels")] == [3]


def test_several_folders_of_pictures_are_refused_with_their_names(tmp_path):
    save(tmp_path / "a", "0.png")
    save(tmp_path / "b", "0.png")
    assert frame_folder(tmp_path) == tmp_path
    with pytest.raises(VideoError, match=r"holds no images\. There are some in .*a and .*b: pass that folder"):
        open_video(tmp_path)


def test_a_folder_of_videos_or_of_heif_pictures_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "IMG_1.HEIC").touch()
    with pytest.raises(VideoError, match=r"IMG_1\.HEIC is a HEIF picture, which Pillow does not read: convert it"):
        open_video(tmp_path)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(VideoError, match=r"There are videos, such as .*a\.mp4: pass one of them"):
        open_video(tmp_path)


def test_pictures_of_a_format_that_is_not_read_are_left_out_and_this_is_said(tmp_path):
    save(tmp_path, "0.jpg", "1.jpg")
    (tmp_path / "IMG_1.HEIC").touch()
    with pytest.warns(UserWarning, match=r"1 picture of a format that is not read, such as IMG_1\.HEIC: left out"):
        video = open_video(tmp_path)
    assert video.length == 2


def test_a_single_label_is_spoken_of_as_one(tmp_path):
    save(tmp_path, "0.jpg", "1.jpg", "0.png")
    with pytest.warns(UserWarning, match=r"1 picture such as 0\.png lies beside a frame as its label and is left out"):
        open_video(tmp_path)
