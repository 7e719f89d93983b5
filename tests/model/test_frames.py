from __future__ import annotations

import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import models as zoo
from ttt_adapt import Normalize, TTTAdaptError
from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError
from ttt_adapt.model.frames import FrameIntake, default_preprocess, to_model_input

CPU = torch.device("cpu")
NORMALIZE = Normalize()


def picture(h=6, w=9, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def by_hand(frame: np.ndarray, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> torch.Tensor:
    x = (frame.astype(np.float64) / 255.0 - np.array(mean)) / np.array(std)
    return torch.from_numpy(x.transpose(2, 0, 1)[None]).float()


def take(frame, preprocess=NORMALIZE, **more):
    return to_model_input(frame, preprocess, CPU, **more)


# ---- what is taken


def test_uint8_rgb_is_scaled_shifted_and_put_channels_first():
    frame = picture()
    x = take(frame)
    assert (x.shape, x.dtype) == ((1, 3, 6, 9), torch.float32)
    assert x.is_contiguous()
    torch.testing.assert_close(x, by_hand(frame), rtol=1e-5, atol=1e-5)
    assert torch.equal(take(torch.from_numpy(frame)), x)


def test_the_frame_itself_is_never_written_to():
    frame, x = picture(), torch.randn(3, 6, 9)
    copies = frame.copy(), x.clone()
    take(frame).add_(1)
    take(x)
    assert (frame == copies[0]).all()
    assert torch.equal(x, copies[1])


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x[None], lambda x: x.numpy(), lambda x: x.numpy()[None]])
def test_floats_pass_through_as_they_are(make):
    x = torch.randn(3, 6, 9)
    assert torch.equal(take(make(x)), x[None])
    assert torch.equal(take(make(x), None), x[None])


@pytest.mark.parametrize("view", ["reversed", "strided", "transposed", "read-only"])
def test_views_of_arrays_are_taken_without_a_warning(view):
    frame = {
        "reversed": picture()[..., ::-1],
        "strided": picture(12, 18)[::2, ::2],
        "transposed": picture(9, 6).transpose(1, 0, 2),
        "read-only": picture(),
    }[view]
    if view == "read-only":
        frame.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(take(frame), by_hand(np.ascontiguousarray(frame)), rtol=1e-5, atol=1e-5)
        flipped = np.random.default_rng(0).standard_normal((3, 6, 9)).astype(np.float32)[:, ::-1]
        assert np.array_equal(take(flipped)[0].numpy(), flipped)


def test_frames_that_ask_for_a_gradient_lose_it():
    assert not take(torch.randn(3, 6, 9, requires_grad=True)).requires_grad


def test_a_dtype_may_be_asked_for():
    x = np.random.default_rng(0).standard_normal((3, 6, 9))
    assert take(x).dtype == torch.float64
    assert torch.equal(take(x, dtype=torch.float32), torch.from_numpy(x).float()[None])
    assert take(picture(), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_preprocess_of_the_users_own_gets_the_frame_as_it_came():
    frame, seen = picture(), []

    def mine(given):
        seen.append(given)
        return torch.from_numpy(given).permute(2, 0, 1)[None].float()

    assert take(frame, mine).shape == (1, 3, 6, 9)
    assert np.array_equal(seen[0], frame)
    take(torch.randn(3, 6, 9), mine)
    assert len(seen) == 1  # floats are the model's input already


# ---- what is refused


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        ("clip.mp4", FrameTypeError, "the frame is of type str; expected a uint8 RGB frame"),
        ([[1, 2], [3, 4]], FrameTypeError, "the frame is of type list"),
        (np.zeros((6, 9, 3), np.int64), FrameTypeError, "dtype int64; expected a uint8 RGB frame"),
        (np.zeros((6, 9, 3), np.uint16), FrameTypeError, "dtype uint16"),
        (np.zeros((6, 9, 3), bool), FrameTypeError, "dtype bool"),
        (np.empty((6, 9, 3), object), FrameTypeError, "dtype object"),
        (np.array(["a"]), FrameTypeError, "dtype <U1"),
        (torch.zeros(3, 6, 9, dtype=torch.complex64), FrameTypeError, "complex64"),
        (torch.zeros(3, 6, 9, device="meta"), FrameTypeError, "meta device, which keeps no values"),
        (torch.zeros(6, 9, 3, dtype=torch.uint8, device="meta"), FrameTypeError, "meta device, which keeps no values"),
        (torch.zeros(3, 6, 9).to_sparse(), FrameTypeError, "pass frame.to_dense"),
        (torch.zeros(3, 6, 9).short(), FrameTypeError, "int16"),
        (np.zeros((3, 6, 9), np.uint8), FrameError, r"\(3, 6, 9\).*\[H, W, 3\] RGB: transpose it"),
        (np.zeros((6, 9), np.uint8), FrameError, r"\(6, 9\); expected \[H, W, 3\].*grey, repeat it"),
        (np.zeros((6, 9, 4), np.uint8), FrameError, r"alpha channel out, frame\[..., :3\]"),
        (None, FrameTypeError, r"the frame is None \(did the video end\?\)"),
        (np.zeros((6, 9, 4), np.uint8), FrameError, r"\(6, 9, 4\)"),
        (np.zeros((1, 6, 9, 3), np.uint8), FrameError, r"\(1, 6, 9, 3\)"),
        (np.zeros((0, 9, 3), np.uint8), FrameError, "empty"),
        (torch.zeros(6, 9, 3), FrameError, r"\(6, 9, 3\); expected \[3, H, W\].*channels come first"),
        (torch.zeros(6, 9), FrameError, r"\(6, 9\)"),
        (torch.zeros(()), FrameError, r"\(\)"),
        (torch.zeros(2, 3, 6, 9), FrameError, r"\(2, 3, 6, 9\)"),
        (torch.zeros(3, 0, 9), FrameError, "empty"),
        (torch.full((3, 6, 9), float("nan")), FrameError, "NaN or infinite"),
        (torch.full((3, 6, 9), float("-inf")), FrameError, "NaN or infinite"),
        (
            torch.rand(3, 6, 9) * 255,
            FrameError,
            r"lies in \[.*normalised with this model's mean.*0..255 frames as uint8",
        ),
    ],
)
def test_what_is_no_frame_is_refused_with_what_came_and_what_to_do(frame, error, message):
    with pytest.raises(error, match=message) as caught:
        take(frame)
    assert isinstance(caught.value, TTTAdaptError)
    assert isinstance(caught.value, TypeError if error is FrameTypeError else ValueError)


def test_one_nan_among_many_pixels_is_found():
    x = torch.zeros(3, 64, 64)
    x[2, 63, 63] = float("nan")
    with pytest.raises(FrameError, match="NaN"):
        take(x)


def test_a_uint8_frame_without_a_known_normalisation_says_how_to_give_one():
    with pytest.raises(FrameError, match=r"preprocess=Normalize\(mean, std\)"):
        take(picture(), None)


@pytest.mark.parametrize("made", [torch.zeros(2, 3, 6, 9), torch.zeros(1, 1, 6, 9), torch.zeros(1, 3, 6, 9).byte()])
def test_a_preprocess_that_returns_no_image_is_refused(made):
    with pytest.raises(FrameError, match="preprocess returned.*expected float"):
        take(picture(), lambda frame: made)


def test_a_preprocess_may_leave_the_batch_axis_out():
    x = torch.rand(3, 6, 9)
    assert torch.equal(take(picture(), lambda frame: x), x[None])


@pytest.mark.parametrize("error", [TypeError, ZeroDivisionError, RuntimeError])
def test_a_preprocess_that_raises_is_told_what_it_gets_and_returns(error):
    def mine(frame):
        raise error("mine")

    wanted = FrameTypeError if error is TypeError else FrameError
    with pytest.raises(wanted, match=rf"preprocess raised {error.__name__}: mine. preprocess gets a uint8 RGB frame"):
        take(picture(), mine)


@pytest.mark.parametrize("wrong", ["imagenet", 3, [0.5] * 3])
def test_a_preprocess_that_cannot_be_called_is_refused_before_the_first_frame(wrong):
    with pytest.raises(ConfigError, match="preprocess is .*expected a function or Normalize"):
        FrameIntake(wrong, CPU, torch.float32)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_transforms_of_torchvision_take_frames(as_tensor):
    from torchvision.transforms import Compose, Normalize, Resize, ToPILImage, ToTensor, v2
    from torchvision.transforms._presets import ImageClassification

    frame = torch.from_numpy(picture(24, 32)) if as_tensor else picture(24, 32)
    wanted = by_hand(picture(24, 32))
    norm = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for made in (
        Compose([ToPILImage(), ToTensor(), norm]),
        Compose([ToTensor(), norm]),
        Compose([Resize(24), ToTensor(), norm]),
        v2.Compose([v2.ToDtype(torch.float32, scale=True), norm]),
    ):
        torch.testing.assert_close(take(frame, made), wanted)
    assert take(frame, ImageClassification(crop_size=20, resize_size=24)).shape == (1, 3, 20, 20)


@pytest.mark.parametrize(
    "call",
    [
        lambda: take(picture(), lambda frame: torch.zeros(1, 1, 6, 9)),
        lambda: take(picture(), lambda frame: torch.zeros(1, 6, 9)),
        lambda: take(torch.zeros(1, 6, 9)),
        lambda: Normalize([0.5], [0.25]),
    ],
)
def test_the_way_of_a_model_of_one_channel_is_told(call):
    with pytest.raises(TTTAdaptError, match=r"wrap the model in a module .*x.mean\(1, keepdim=True\)"):
        call()


# ---- Normalize


@pytest.mark.parametrize(
    "wrong",
    [
        {"std": (0.2, 0.2, 0.0)},
        {"mean": (0.5, 0.5)},
        {"std": (0.2,)},
        {"mean": None, "std": None},
        {"mean": 0.5},
        {"std": ["a"] * 3},
    ],
)
def test_a_normalisation_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="three finite numbers each, std above 0"):
        Normalize(**wrong)


def test_a_fixed_size_resizes_bicubically_with_antialiasing():
    frame = picture(20, 30)
    x = Normalize(size=(8, 12))(frame)
    expected = F.interpolate(by_hand(frame), (8, 12), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(Normalize(size=(20, 30))(frame), Normalize()(frame))


def test_timm_models_say_their_own_normalisation_and_other_models_none():
    model = zoo.eva()
    normalize = default_preprocess(model, CPU)
    assert normalize.mean == tuple(model.pretrained_cfg["mean"])
    assert normalize.std == tuple(model.pretrained_cfg["std"])
    assert normalize.mean != Normalize().mean  # EVA's is not ImageNet's
    assert normalize.size is None
    assert default_preprocess(zoo.PlainSeg(), CPU) is None


def test_a_model_that_takes_one_size_gets_it():
    assert default_preprocess(zoo.vit(dynamic_img_size=False), CPU).size == (224, 224)
    assert default_preprocess(zoo.beit(), CPU).size == (224, 224)
    assert default_preprocess(zoo.swin(), CPU).size is None


def test_a_model_that_takes_one_size_gets_its_own_and_not_that_of_patches_behind_its_stem():
    model = timm.create_model("visformer_tiny", depth=(1, 1, 1))  # its embeddings name 112, 28 and 14
    assert default_preprocess(model, CPU).size == (224, 224)
