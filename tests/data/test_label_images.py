"""Label images of every kind hold the ids that were stored, or are refused by name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from ttt_adapt.data import LabelledClip
from ttt_adapt.data.images import read_ids, read_mask
from ttt_adapt.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

IDS = np.array([[0, 1, 1, 0], [1, 0, 0, 1]], np.uint8)


def grey_png(path: Path, ids: np.ndarray, bits: int) -> Path:
    """A grey PNG of 1, 2, 4, 8 or 16 bits, which Pillow does not write in all cases."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b""
    for row in ids:
        text = "".join(format(int(value), f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    head = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_labels_of_any_depth_hold_their_ids_as_they_are_stored(tmp_path, bits):
    ids = IDS if bits == 1 else IDS * (3 if bits == 2 else 11)
    read = read_ids(grey_png(tmp_path / "a.png", ids, bits))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, ids)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_labels_of_any_depth_hold_ids_even_where_a_colour_is_transparent(tmp_path, bits):
    image = Image.fromarray(IDS)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.save(tmp_path / "a.png", bits=bits, transparency=0)
    np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), IDS)


def test_labels_with_an_orientation_are_turned_as_their_frames_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IDS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), np.rot90(IDS, -1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (4, 2)), "mode RGB; expected a palette or 8-bit grayscale image of class ids"),
        (Image.new("RGBA", (4, 2)), "mode RGBA"),
        (Image.new("LA", (4, 2)), "mode LA"),
        (Image.fromarray(np.full((2, 4), 300, np.uint16)), "ids from 300 to 300; expected class ids from 0 to 255"),
    ],
)
def test_images_of_no_ids_are_refused_by_name(tmp_path, image, message):
    image.save(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"a\.png (has|holds) {message}"):
        read_ids(tmp_path / "a.png")


def test_masks_of_one_bit_are_masks(tmp_path):
    Image.fromarray(IDS * 255).convert("1").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), IDS)


def test_labels_may_have_suffixes_in_capitals(tmp_path):
    for part, array in (("images", np.zeros((2, 4, 3), np.uint8)), ("labels", IDS)):
        (tmp_path / "clip" / part).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / "clip" / part / "0.PNG")
    np.testing.assert_array_equal(LabelledClip(tmp_path / "clip", classes=["a", "b"])[0][1], IDS)


def test_a_frame_that_is_there_in_two_kinds_is_one_frame(tmp_path):
    for name in ("0.jpg", "0.png"):
        (tmp_path / "clip" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(tmp_path / "clip" / "images" / name)
    (tmp_path / "clip" / "labels").mkdir()
    Image.fromarray(IDS).save(tmp_path / "clip" / "labels" / "0.png")
    assert len(LabelledClip(tmp_path / "clip", classes=["a", "b"])) == 1
