"""Pipelines of OpenMMLab show the pictures that streams, clips and training of the library show."""

from __future__ import annotations

import numpy as np
import pytest
from mmengine.registry import TRANSFORMS
from PIL import Image

import miniatures
import ttt_adapt_openmmlab  # noqa: F401
from ttt_adapt.errors import DataError
from ttt_adapt.video import open_video
from ttt_adapt_openmmlab import CamVidStream

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)


def turned(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


KINDS = {
    "turned.jpg": lambda file: Image.fromarray(COLOURS[..., :3]).save(file, exif=turned(6)),
    "turned.tiff": lambda file: Image.fromarray(COLOURS[..., :3]).save(file, exif=turned(3)),
    "turned.png": lambda file: Image.fromarray(COLOURS[..., :3]).save(file, exif=turned(8)),
    "deep.png": lambda file: Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257).save(file),
    "transparent.png": lambda file: Image.fromarray(COLOURS).save(file),
    "print.jpg": lambda file: Image.fromarray(COLOURS, mode="CMYK").save(file),
    "grey.png": lambda file: Image.fromarray(COLOURS[..., 0]).save(file),
}


@pytest.mark.filterwarnings("ignore")  # what was done to a picture is said
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("real", [False, True])
def test_a_picture_of_any_kind_is_the_one_of_a_stream(name, real, tmp_path):
    KINDS[name](tmp_path / name)
    loaded = TRANSFORMS.build({"type": "LoadPicture", "to_float32": real})({"img_path": str(tmp_path / name)})
    (streamed,) = open_video(tmp_path)
    assert loaded["img"].dtype == (np.float32 if real else np.uint8)
    assert np.array_equal(loaded["img"][..., ::-1], streamed)
    assert loaded["img_shape"] == loaded["ori_shape"] == streamed.shape[:2]


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("absent.png", "broken.png"):
        with pytest.raises(DataError, match=name):
            TRANSFORMS.build({"type": "LoadPicture"})({"img_path": str(tmp_path / name)})


def test_a_data_set_knows_the_size_of_upright_frames(tmp_path):
    root = miniatures.camvid(tmp_path)
    for file in (root / "one_a" / "frames").iterdir():
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file, exif=turned(6))
    dataset = CamVidStream(root, ["one_a"], pipeline=[{"type": "LoadPicture"}])
    assert [(info["height"], info["width"]) for info in dataset] == [(miniatures.HEIGHT, miniatures.WIDTH)] * 3
    assert {info["img"].shape[:2] for info in dataset} == {(miniatures.HEIGHT, miniatures.WIDTH)}


def test_a_label_image_that_is_stored_turned_is_refused(tmp_path):
    file = miniatures.camvid(tmp_path) / "one_a" / "labels" / "1_one_a.png"
    Image.open(file).save(file, exif=turned(3))
    with pytest.raises(DataError, match=r"1_one_a\.png has the EXIF orientation 3; expected .* stored upright"):
        CamVidStream(tmp_path, ["one_a"])
