"""Tones of an image, and the curve that changes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt_adapt.model.tone import LEVELS, SAMPLES, STEEPEST, along_curve, levels_of


def image(height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
    return torch.randn(1, 3, height, width, generator=generator) * scale + scale


def test_levels_are_quantiles_of_every_channel_in_rising_order():
    x = image()
    levels = levels_of(x)
    expected = np.quantile(x.numpy()[0].reshape(3, -1), np.linspace(0.02, 0.98, LEVELS), axis=1, method="nearest")
    np.testing.assert_allclose(levels.numpy(), expected.T, atol=1e-2)
    assert (levels.diff(dim=1) > 0).all()


def test_levels_of_a_large_image_come_from_an_even_grid_of_it():
    x = image(600, 800)
    every = np.quantile(x.numpy()[0].reshape(3, -1), np.linspace(0.02, 0.98, LEVELS), axis=1).T
    scale = x.std((0, 2, 3)).numpy()[:, None]
    assert np.abs((levels_of(x).numpy() - every) / scale).max() < 0.25
    step = int((600 * 800 // SAMPLES) ** 0.5)
    changed = x.clone()
    changed[:, :, 1::step] = 99.0  # rows that are not looked at
    assert torch.equal(levels_of(changed), levels_of(x))


def test_one_in_a_hundred_pixels_changes_no_level_much():
    x = image()
    hot = x.clone()
    hot.view(3, -1)[:, ::100] = 1000.0
    scale = x.std((0, 2, 3))[:, None]
    assert ((levels_of(hot) - levels_of(x)) / scale).abs().max() < 0.4


def test_levels_become_those_that_are_wanted():
    x, source = image(), image(seed=1) * 0.4 + 3.0
    wanted = levels_of(source)
    found = levels_of(along_curve(x, levels_of(x), wanted))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_curve_keeps_the_order_of_tones_and_has_slope_one_beyond_the_outermost_levels():
    x = torch.linspace(-9.0, 9.0, 3 * 64 * 64).view(1, 64, 64, 3).permute(0, 3, 1, 2)
    levels, wanted = levels_of(image()), levels_of(image(seed=1) * 0.4 + 3.0)
    y = along_curve(x, levels, wanted)
    for channel in range(3):
        before, after = x[0, channel].flatten(), y[0, channel].flatten()
        assert (after.diff() >= -1e-5).all()
        for outside in (before < levels[channel, 0], before > levels[channel, -1]):
            torch.testing.assert_close(after[outside].diff(), before[outside].diff(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_where_nothing_is_wanted_the_image_is_the_same_bit_for_bit(dtype):
    x = image().to(dtype)
    levels = levels_of(x)
    assert levels.dtype == torch.promote_types(dtype, torch.float32)
    y = along_curve(x, levels, levels)
    assert y.dtype == dtype
    assert torch.equal(y, x)


def test_an_exposure_and_a_gamma_are_undone():
    clean = image().sigmoid()
    dark = 0.3 * clean**2.2
    restored = along_curve(dark, levels_of(dark), levels_of(clean))
    inner = (clean > levels_of(clean)[:, :1, None]) & (clean < levels_of(clean)[:, -1:, None])
    assert (restored - clean)[inner].abs().mean() < 0.05 * (dark - clean)[inner].abs().mean()


def test_an_image_of_one_colour_moves_to_the_mean_of_the_wanted_levels():
    wanted = levels_of(image())
    flat = torch.full((1, 3, 32, 32), 0.25)
    moved = along_curve(flat, levels_of(flat), wanted)
    torch.testing.assert_close(moved[0, :, 5, 5], wanted.mean(1), rtol=1e-5, atol=1e-5)
    assert moved.std((0, 2, 3)).max() < 1e-6


@pytest.mark.parametrize("width", [1e-4, 0.01, 0.1])
def test_an_image_of_little_contrast_keeps_its_place_and_its_noise_is_limited(width):
    wanted = levels_of(image())
    narrow = 0.25 + width * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = levels_of(narrow)
    moved = along_curve(narrow, levels, wanted)
    assert (moved.std((0, 2, 3)) <= STEEPEST * 1.01 * narrow.std((0, 2, 3))).all()
    spread = (wanted[:, -1] - wanted[:, 0])[:, None]
    assert ((levels_of(moved).mean(1) - wanted.mean(1)).abs() <= 0.02 * spread[:, 0]).all()
    assert ((levels_of(moved) - wanted).abs() <= spread).all()


def test_levels_of_one_value_become_their_mean_and_all_others_are_exact():
    dark = image().clamp_min(0.6)  # blacks are crushed: the lowest levels are one value
    levels, wanted = levels_of(dark), levels_of(image(seed=1) * 0.2 + 1.0)  # flat enough for a gentle curve
    found = levels_of(along_curve(dark, levels, wanted))
    for channel in range(3):
        for value in levels[channel].unique():
            group = levels[channel] == value
            expected = wanted[channel][group].mean().expand(int(group.sum()))
            torch.testing.assert_close(found[channel][group], expected, rtol=1e-4, atol=1e-4)
    assert (levels.diff(dim=1) == 0).any()
