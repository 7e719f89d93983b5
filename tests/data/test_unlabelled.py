"""Clips of pictures and videos without labels: what is found, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from colours import SIZE, colour_frames, write_album, write_video
from ttt_adapt.data import PictureClip, VideoClip, open_frames
from ttt_adapt.errors import DataError, VideoError
from ttt_adapt.video import VideoReader
from ttt_adapt.video.pictures import rgb8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_album(tmp_path_factory.mktemp("pictures") / "album")


def test_any_folder_of_pictures_is_found_to_the_end_without_its_labels(pictures):
    found = {clip.name: len(clip) for clip in open_frames(pictures)}
    assert found == {"deep": 5, "er": 1, "trip": 4}
    frame, labels = open_frames(pictures, ["er"], SIZE)[0][0]
    assert (frame.shape, frame.dtype, labels.shape) == ((*SIZE, 3), np.uint8, SIZE)
    with pytest.raises(DataError, match="no clip 'tripp'.*nearest: 'trip'"):
        open_frames(pictures, ["tripp"])


def test_a_picture_is_scaled_and_cropped_but_not_distorted(tmp_path):
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 200  # a square in the middle
    Image.fromarray(wide).save(tmp_path / "wide.png")
    frame = open_frames(tmp_path, size=(20, 20))[0][0][0]
    assert frame[1:-1, 1:-1].min() == 200


def test_pictures_of_every_size_fit_any_other(tmp_path):
    """Scaled sides are fractions, and Pillow refuses a window that ends a rounding error outside of the picture."""
    sizes = [(480, 640), (427, 640), (640, 483), (333, 500), (61, 83), (1, 1), (7, 1000)]
    for i, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height), (9, 90, 200)).save(tmp_path / f"{i}.png")
    for size in ((96, 160), (33, 21), (224, 224)):
        for frame, _ in open_frames(tmp_path, size=size)[0]:
            assert frame.shape == (*size, 3)
            assert (frame == (9, 90, 200)).all()


def test_layouts_of_data_sets_are_walked_and_a_mask_beside_its_photograph_is_no_picture(tmp_path):
    frame = Image.fromarray(colour_frames(1)[0])
    for place in ("JPEGImages/480p/bear", "Annotations/480p/bear", "train/n01440764", "train/n01443537"):
        (tmp_path / place).mkdir(parents=True)
    frame.save(tmp_path / "JPEGImages/480p/bear/0.jpg")
    frame.convert("P").save(tmp_path / "Annotations/480p/bear/0.png")
    for name in ("n01440764", "n01443537"):
        frame.save(tmp_path / "train" / name / "a.JPEG")
        frame.convert("P").save(tmp_path / "train" / name / "a.png")
    assert {clip.name: len(clip) for clip in open_frames(tmp_path)} == {"bear": 1, "n01440764": 1, "n01443537": 1}


def test_every_kind_of_picture_becomes_the_same_rgb(tmp_path):
    rgb = colour_frames(1)[0]
    image = Image.fromarray(rgb)
    cases = {
        "plain.png": (image, rgb),
        "grey.png": (image.convert("L"), np.repeat(np.asarray(image.convert("L"))[..., None], 3, 2)),
        "bilevel.png": (Image.new("1", (4, 4), 1), np.full((4, 4, 3), 255)),
        "sixteen.png": (Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)), np.full((4, 4, 3), 0x80)),
        "clear.png": (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), np.full((4, 4, 3), 255)),
        "palette.png": (image.quantize(4), np.asarray(image.quantize(4).convert("RGB"))),
    }
    for name, (picture, expected) in cases.items():
        picture.save(tmp_path / name)
        with Image.open(tmp_path / name) as read:
            assert np.array_equal(rgb8(read, tmp_path / name), expected), name


def test_a_picture_of_real_numbers_or_of_nothing_is_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(DataError, match=r"real\.tif has mode F"):
        open_frames(tmp_path)[0][0]
    (tmp_path / "real.tif").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"real\.tif cannot be read"):
        open_frames(tmp_path)[0][0]


def test_a_video_is_a_clip_read_in_order_or_by_index_up_to_a_limit(tmp_path):
    frames = colour_frames(5)
    write_video(tmp_path / "film.mkv", frames)
    clip = open_frames(tmp_path / "film.mkv", frames=4)[0]
    assert isinstance(clip, VideoClip)
    assert (len(clip), clip.fps, clip.name) == (4, 12.0, "film")
    assert all(np.array_equal(a, b) for (a, _), b in zip(clip, frames[:4], strict=True))
    assert np.array_equal(clip[3][0], frames[3])
    assert np.array_equal(clip[1][0], frames[1])


def test_no_clip_vanishes_because_of_its_name(tmp_path):
    frame = colour_frames(1)[0]
    for name in ("film.mp4", "film.mkv", "other.mkv"):
        write_video(tmp_path / name, [frame], codec="mpeg4", pix_fmt="yuv420p")
    for folder in ("film", "a/b", "c/b", "c-b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(frame).save(tmp_path / folder / "0.png")
    found = [clip.name for clip in open_frames(tmp_path)]
    assert sorted(found) == ["b", "c-b", "c-b-2", "film", "film-2", "film.mp4", "other"]
    assert {clip.name: type(clip) for clip in open_frames(tmp_path, ["film.mp4", "film-2"])} == {
        "film.mp4": VideoClip, "film-2": PictureClip,
    }  # fmt: skip


def test_a_video_with_fewer_frames_than_it_announces_is_named_with_both_numbers(tmp_path, monkeypatch):
    clip = VideoClip("film", write_video(tmp_path / "film.mkv", colour_frames(3)))
    monkeypatch.setattr(VideoReader, "length", 5)
    assert clip[2][0].shape == (*SIZE, 3)
    with pytest.raises(DataError, match=r"film\.mkv announces 5 frames, but only 3 can be decoded: frame 4"):
        clip[4]


def test_a_video_that_was_read_from_can_be_read_by_other_processes(tmp_path):
    frames = colour_frames(12)
    clip = VideoClip("film", write_video(tmp_path / "film.mkv", frames))
    assert np.array_equal(clip[2][0], frames[2])  # its decoder is in the middle, with a thread of its own
    order = [11, 0, 5, 7, 3, 2]
    for method in ("fork", "spawn"):
        loader = DataLoader(clip, None, sampler=order, num_workers=2, timeout=120, multiprocessing_context=method)
        for index, (frame, _) in zip(order, loader, strict=True):
            assert np.array_equal(frame, frames[index])
    assert np.array_equal(clip[4][0], frames[4])


def test_a_broken_video_among_the_clips_is_named(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match=r"film\.mp4 is empty"):
        open_frames(tmp_path)


def test_pictures_keep_their_sizes_without_one(pictures):
    clip = next(c for c in open_frames(pictures) if c.name == "deep")
    assert isinstance(clip, PictureClip)
    assert set(clip.sizes()) == {(61, 83)}
    assert len(clip.but_grey()) == 3


def test_folders_that_hold_themselves_are_walked_once(pictures, tmp_path):
    (tmp_path / "album").mkdir()
    Image.fromarray(colour_frames(1)[0]).save(tmp_path / "album" / "a.png")
    (tmp_path / "album" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [clip.name for clip in open_frames(tmp_path)] == ["album"]


def test_pictures_of_several_sizes_are_named(tmp_path):
    for name, side in (("a.png", 8), ("b.png", 9), ("c.png", 8)):
        Image.new("RGB", (side, 4)).save(tmp_path / name)
    (clip,) = open_frames(tmp_path)
    assert clip.sizes() == {(4, 8): tmp_path / "a.png", (4, 9): tmp_path / "b.png"}
