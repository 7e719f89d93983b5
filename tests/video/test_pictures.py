"""Pictures of every kind: one frame, the same for streams, labelled clips and pictures without labels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from ttt_adapt.data import LabelledClip, open_frames
from ttt_adapt.errors import DataError, VideoError
from ttt_adapt.video import open_video
from ttt_adapt.video.pictures import header, read_pages, read_picture

Image = pytest.importorskip("PIL.Image", reason='needs Pillow: pip install "ttt-adapt[video]"')
features = pytest.importorskip("PIL.features")

SIZE = (24, 32)
RAMP = np.linspace(0, 65535, SIZE[1]).astype(np.uint16)[None].repeat(SIZE[0], 0)
COLOUR = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
HALF = np.where(np.arange(SIZE[1]) < 16, 0, 255).astype(np.uint8)[None].repeat(SIZE[0], 0)


def on_white(alpha: np.ndarray) -> np.ndarray:
    part = alpha[..., None] / 255
    return COLOUR * part + 255 * (1 - part)


def palette_with_hidden_colour():
    image = Image.fromarray((HALF // 255).astype(np.uint8))
    image.putpalette([9, 9, 9, 200, 100, 50])
    return image, {"transparency": 0}


KINDS = {
    "rgb.png": (Image.fromarray(COLOUR), {}, COLOUR),
    "grey.png": (Image.fromarray(GREY), {}, GREY[..., None].repeat(3, 2)),
    "deep.png": (Image.fromarray(RAMP), {}, (RAMP >> 8)[..., None].repeat(3, 2)),
    "deep.tif": (Image.fromarray(RAMP), {}, (RAMP >> 8)[..., None].repeat(3, 2)),
    "bit.png": (Image.fromarray(HALF).convert("1"), {}, HALF[..., None].repeat(3, 2)),
    "clear.png": (Image.fromarray(np.dstack([COLOUR, np.zeros(SIZE, np.uint8)])), {}, np.full((*SIZE, 3), 255)),
    "glass.png": (Image.fromarray(np.dstack([COLOUR, GREY])), {}, on_white(GREY)),
    "opaque.png": (Image.fromarray(np.dstack([COLOUR, np.full(SIZE, 255, np.uint8)])), {}, COLOUR),
    "la.png": (Image.fromarray(np.dstack([GREY, HALF])), {}, np.where(HALF, GREY, 255)[..., None].repeat(3, 2)),
    "key.png": (Image.fromarray(HALF), {"transparency": 0}, np.full((*SIZE, 3), 255)),
    "palette.png": (
        *palette_with_hidden_colour(),
        np.where(HALF[..., None] > 0, np.array([200, 100, 50]), 255),
    ),
    "opaque_palette.png": (palette_with_hidden_colour()[0], {}, np.where(HALF[..., None] > 0, [200, 100, 50], 9)),
    "print.tif": (Image.fromarray(255 - COLOUR).convert("CMYK"), {}, 255 - COLOUR),
    "frame.bmp": (Image.fromarray(COLOUR), {}, COLOUR),
    "frame.ppm": (Image.fromarray(COLOUR), {}, COLOUR),
    "frame.gif": (Image.fromarray(HALF), {}, HALF[..., None].repeat(3, 2)),
    "frame.webp": (Image.fromarray(COLOUR), {"lossless": True}, COLOUR),
}


def write_clip(folder: Path, name: str, image, options, size=SIZE) -> Path:
    """A labelled clip of one frame; every label is 0."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    image.save(folder / "images" / name, **options)
    Image.fromarray(np.zeros(size, np.uint8)).save(folder / "labels" / f"{Path(name).stem}.png")
    return folder


def frames_of(clip: Path) -> list[np.ndarray]:
    """The frame as a stream, a labelled clip and an album show it."""
    return [
        next(iter(open_video(clip / "images"))),
        LabelledClip(clip, classes=["a"])[0][0],
        open_frames(clip / "images")[0][0][0],
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_is_the_same_frame_for_stream_clip_and_album(tmp_path, name):
    image, options, expected = KINDS[name]
    for frame in frames_of(write_clip(tmp_path / "clip", name, image, options)):
        assert (frame.dtype, frame.shape) == (np.uint8, (*SIZE, 3))
        assert np.abs(frame.astype(int) - expected).max() <= 1
        frame[:] = 0  # the caller's own


@pytest.mark.parametrize("suffix", [".jpg", ".jpe", ".jfif", ".JPEG", ".jp2", ".avif", ".webp"])
def test_photographs_of_every_suffix_are_found_and_read(tmp_path, suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    smooth = np.add.outer(np.arange(24), np.arange(32)).astype(np.uint8)[..., None].repeat(3, 2) * 4
    kind = {".jp2": "JPEG2000", ".avif": "AVIF", ".webp": "WEBP"}.get(suffix, "JPEG")
    clip = write_clip(tmp_path / "clip", f"0{suffix}", Image.fromarray(smooth), {"format": kind})
    for frame in frames_of(clip):
        assert np.abs(frame.astype(int) - smooth).mean() < 4


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_upright_everywhere_and_labels_of_the_upright_picture_fit(tmp_path, kind, orientation):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    stored = np.zeros((*SIZE, 3), np.uint8)
    stored[:8, :16] = 255
    expected = UPRIGHT[orientation](stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    clip = write_clip(tmp_path / "clip", f"0.{kind}", Image.fromarray(stored), {"exif": exif}, expected.shape[:2])
    for frame in frames_of(clip):
        assert frame.shape == expected.shape
        assert np.abs(frame.astype(int) - expected).mean() < 8
    assert header(clip / "images" / f"0.{kind}").size == expected.shape[:2]
    LabelledClip(clip, classes=["a"]).check_labels()


def test_labels_of_the_stored_picture_are_refused_with_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    clip = write_clip(tmp_path / "clip", "0.jpg", Image.fromarray(COLOUR), {"exif": exif})
    with pytest.raises(DataError, match=r"0\.png is 24 x 32, its frame 0\.jpg is 32 x 24 .*EXIF orientation is 6"):
        LabelledClip(clip, classes=["a"])[0]


def test_broken_exif_data_do_not_break_a_picture(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(read_picture(tmp_path / "a.png"), COLOUR)


def test_what_was_done_is_said_once_for_a_folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(RAMP).save(tmp_path / name)
    Image.fromarray(np.dstack([COLOUR, GREY])).save(tmp_path / "c.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(open_video(tmp_path))
        list(open_frames(tmp_path)[0])
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert "a.png is 16-bit grey: its upper 8 bits are used" in said[0]
    assert "c.png has transparent pixels: they are shown on white" in said[1]


def test_plain_pictures_are_read_without_a_word(tmp_path, recwarn):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    list(open_video(tmp_path))
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)] == []


def pages(values=(0, 80, 160)) -> list:
    return [Image.fromarray(np.full((*SIZE, 3), value, np.uint8)) for value in values]


@pytest.mark.parametrize("kind", ["tiff", "gif", "webp", "png"])
def test_of_several_pages_a_folder_shows_the_first_and_says_so_and_the_file_alone_shows_all(tmp_path, kind):
    first, *others = pages()
    file = tmp_path / f"stack.{kind}"
    first.save(file, save_all=True, append_images=others, duration=40, lossless=True)
    with pytest.warns(UserWarning, match=rf"stack\.{kind} holds several pictures: the first is used"):
        frames = list(open_video(tmp_path))
    assert [int(frame.mean()) for frame in frames] == [0]
    with open_video(file) as video:
        assert [round(float(frame.mean()) / 80) for frame in video] == [0, 1, 2]
        assert (video.length, video.size) == (3, SIZE)
        assert video.fps == (None if kind == "tiff" else 25)


def test_pages_of_several_sizes_are_refused_after_the_good_ones(tmp_path):
    first, second, third = pages()
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second, third.resize((8, 8))])
    seen = []
    with pytest.raises(VideoError, match=r"a\.tif changes its size at page 2: 8 x 8.*24 x 32"):  # noqa: PT012
        for frame in open_video(tmp_path / "a.tif"):
            seen.append(frame)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("empty.png", b"", r"it is empty \(0 bytes\)"),
        ("text.jpg", b"no picture", "of no kind that Pillow knows.*convert it"),
        ("video.avif", b"no picture", r"AVIF needs pillow 11\.3"),
        ("gone.png", None, "it does not exist"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(tmp_path, name, contents, message):
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=rf"{name} cannot be read as a picture: .*{message}"):
        read_picture(tmp_path / name)
    with pytest.raises(DataError, match=name):
        header(tmp_path / name)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "bmp", "ppm"])
def test_a_truncated_picture_is_named(tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    Image.fromarray(COLOUR).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{kind} cannot be read as a picture"):
        read_picture(file)
    with pytest.raises(VideoError, match=rf"a\.{kind}"):
        open_video(file)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.png .*too large.*make it smaller"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(VideoError, match=r"a\.png \(frame 0\) .*too large"):
        open_video(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(-1, 5), (0, 65536)])
def test_grey_beyond_16_bits_is_refused(tmp_path, low, high):
    values = np.full(SIZE, low, np.int32)
    values[0, 0] = high
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif holds values from {low} to {high}; expected 16-bit grey"):
        read_picture(tmp_path / "a.tif")


def test_reading_pages_ends_where_the_picture_does(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    assert [np.array_equal(page, COLOUR) for page in read_pages(tmp_path / "a.png")] == [True]
