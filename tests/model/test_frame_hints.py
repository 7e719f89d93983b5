"""The error of a wrong frame holds the way to a right one, and that way works."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import models as zoo
from conftest import settle_norms
from ttt_adapt import Normalize, StreamAdapter, calibrate
from ttt_adapt.errors import FrameError, FrameTypeError
from ttt_adapt.model.frames import to_model_input

RGB = np.random.default_rng(0).integers(2, 250, (6, 9, 3), dtype=np.uint8)
RGBA = np.dstack([RGB, RGB[..., :1]])
FLOAT = RGB.astype(np.float32) / 255


def refused(frame) -> str:
    with pytest.raises((FrameError, FrameTypeError)) as caught:
        to_model_input(frame, Normalize(), torch.device("cpu"))
    return str(caught.value)


def follow(frame, message: str):
    """What the expressions of the message make of the frame, one after the other."""
    for step in message.partition("RGB: ")[2].split(", then "):
        expression = re.search(r"(np\.|frame).*?(?= \(of BGRA|$)", step)[0]
        frame = eval(expression, {"frame": frame, "np": np, "torch": torch})
    return frame


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (RGB[..., 0], RGB[..., :1].repeat(3, 2)),
        (RGB[..., :1], RGB[..., :1].repeat(3, 2)),
        (RGB[..., :2], RGB[..., :1].repeat(3, 2)),
        (RGBA, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (RGBA.transpose(2, 0, 1), RGB),
        (RGB[None], RGB),
        (RGB[None].transpose(0, 3, 1, 2), RGB),
        (RGB[None, ..., 0], RGB[..., :1].repeat(3, 2)),
        (torch.from_numpy(RGB)[..., 0], RGB[..., :1].repeat(3, 2)),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(RGBA)[None], RGB),
    ],
)
def test_bytes_of_another_layout_become_a_frame_as_the_error_says(frame, expected):
    made = follow(frame, refused(frame))
    np.testing.assert_array_equal(np.asarray(made), expected)
    to_model_input(made, Normalize(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("frame", "way"),
    [
        (FLOAT, "channels come first, and HWC frames are uint8: make it bytes, (255 * frame).round().astype(np.uint8)"),
        (FLOAT * 255, "channels come first, and HWC frames are uint8: make it bytes, frame.astype(np.uint8)"),
        (FLOAT[..., 0], "repeat it in three channels, np.repeat(frame[..., None], 3, axis=2), then make it bytes"),
        (torch.from_numpy(FLOAT), "(255 * frame).round().to(torch.uint8)"),
        (FLOAT[None], "it is a batch of one, take frame[0], then make it bytes"),
        (torch.rand(4, 6, 9), "leave its alpha channel out"),
        (torch.randn(2, 3, 6, 9), "it is a batch, pass its frames one by one"),
        (np.stack([RGB, RGB]), "it is a batch, pass its frames one by one"),
        (RGB.astype(np.int64), "make it bytes, frame.astype(np.uint8)"),
        (RGB.astype(np.uint16) * 256, "make it bytes of its upper 8 bits, (frame >> 8).astype(np.uint8)"),
        (RGB > 100, "make it bytes, 255 * frame.astype(np.uint8)"),
        (torch.from_numpy(RGB).int(), "make it bytes, frame.to(torch.uint8)"),
        ("a.mp4", "read it first, by ttt_adapt.video.open_video(path)"),
        (RGB.tolist(), "pass np.asarray(frame, dtype=np.uint8)"),
        ([RGB, RGB], "pass the frames one by one, or all by adapter.stream(frames)"),
        ((True, RGB), "pass the array alone"),
    ],
)
def test_other_frames_are_refused_with_the_way(frame, way):
    assert way in refused(frame)


def test_a_pil_image_is_refused_with_the_way_and_bgr_is_told_of():
    image = pytest.importorskip("PIL.Image").fromarray(RGB)
    message = refused(image)
    assert 'np.asarray(image.convert("RGB"))' in message
    assert "OpenCV's BGR, pass frame[..., ::-1]" in message


@pytest.mark.parametrize("frame", [np.array(["a"]), np.zeros((6, 9, 3), complex), torch.randn(6, 9), RGB[:0], {}])
def test_where_there_is_no_way_none_is_told(frame):
    assert "make it" not in refused(frame)


def test_the_advice_of_a_stream_is_about_what_came_an_array_or_a_tensor():
    model = settle_norms(zoo.UNet())
    stills = [torch.randn(3, 32, 48) for _ in range(8)]
    with StreamAdapter(model, calibration=calibrate(model, stills, choose=False), preprocess=Normalize()) as adapter:
        for frame, word in ((np.zeros((32, 48), np.uint8), "np.repeat"), (torch.zeros(32, 48).byte(), "expand")):
            with pytest.raises(FrameError, match=word):
                adapter.step(frame)
