"""Scores of colorization: they are those of torchmetrics, and they are told apart from doing nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from colours import SIZE, colour_frames, write_metric_weights
from ttt_adapt.colour import to_grey
from ttt_adapt.errors import DataError, FrameError
from ttt_adapt.tasks.colorization.networks import ALEXNET
from ttt_adapt.tasks.colorization.score import ColourScore


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_metric_weights(tmp_path_factory.mktemp("weights"))


def test_psnr_and_ssim_are_those_of_torchmetrics_and_the_grey_is_what_doing_nothing_scores():
    truth = colour_frames(3)
    random = np.random.default_rng(0)
    score = ColourScore()
    ours = [np.clip(frame + random.integers(-20, 20, frame.shape), 0, 255).astype(np.uint8) for frame in truth]
    each = [score.update(a, b) for a, b in zip(ours, truth, strict=True)]
    result = score.result()
    a, b = (torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() for frames in (ours, truth))
    assert result["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255.0).item(), abs=1e-3)
    assert result["psnr_frames"] == pytest.approx(np.mean(each))
    assert each[1] == pytest.approx(peak_signal_noise_ratio(a[1], b[1], data_range=255.0).item(), abs=1e-3)
    assert result["ssim"] == pytest.approx(structural_similarity_index_measure(a, b, data_range=255.0).item(), abs=1e-4)
    grey = torch.from_numpy(np.stack([to_grey(frame) for frame in truth])).permute(0, 3, 1, 2).float()
    assert result["psnr_grey"] == pytest.approx(peak_signal_noise_ratio(grey, b, data_range=255.0).item(), abs=1e-3)
    assert result["frames"] == 3


def test_flicker_is_nothing_for_wrong_colours_that_stay_and_grows_with_those_that_jump():
    still = [np.full((*SIZE, 3), (120, 60, 60), np.uint8)] * 4
    wrong = [np.full((*SIZE, 3), (60, 60, 120), np.uint8)] * 4
    found = []
    for predictions in (wrong, [wrong[0], still[0], wrong[0], still[0]]):
        score = ColourScore()
        for prediction, truth in zip(predictions, still, strict=True):
            score.update(prediction, truth)
        found.append(score.result()["flicker"])
    from skimage.color import rgb2lab

    jump = np.linalg.norm((rgb2lab(wrong[0]) - rgb2lab(still[0]))[0, 0, 1:])
    assert found == [0.0, pytest.approx(jump, abs=0.01)]


def test_a_perfect_frame_has_a_finite_psnr_and_a_grey_clip_none():
    score = ColourScore()
    assert score.update(colour_frames(1)[0], colour_frames(1)[0]) == 100.0
    assert score.result()["flicker"] is None
    grey = ColourScore()
    grey.update(to_grey(colour_frames(1)[0]), to_grey(colour_frames(1)[0]))
    with pytest.raises(DataError, match="no colours to score against"):
        grey.result()
    with pytest.raises(FrameError, match="at least 11 pixels"):
        score.update(np.zeros((8, 20, 3), np.uint8), np.zeros((8, 20, 3), np.uint8))


def test_lpips_is_nothing_between_equal_pictures_and_that_of_torchmetrics_otherwise(weights, tmp_path):
    import torchvision
    from torchmetrics.functional.image.lpips import _LPIPS

    (tmp_path / ALEXNET).symlink_to(weights / ALEXNET)
    truth, other = colour_frames(1, (64, 80))[0], colour_frames(1, (64, 80), 5)[0]
    found = []
    for prediction in (truth, other):
        score = ColourScore(tmp_path)
        score.update(prediction, truth)
        found.append(score.result())
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        state = torch.load(weights / ALEXNET)
        patch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", lambda *a, **k: state)
        reference = _LPIPS(net="alex").eval()
    a, b = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1 for image in (other, truth))
    assert found[0]["lpips"] == 0
    assert found[1]["lpips"] == pytest.approx(reference(a, b).item(), rel=1e-4)
    assert (found[1]["fid"], found[1]["inception_score"]) == (None, None)
