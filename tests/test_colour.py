"""Lab, greys and colour cells against scikit-image, brute force and the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import lab2rgb, rgb2lab

from ttt_adapt.colour import colour_frame, gamma, lab_to_rgb, linear, rgb_to_lab, to_grey
from ttt_adapt.tasks.colorization import cells


def pixels(shape=(120, 160), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def level(rgb: np.ndarray) -> np.ndarray:
    """The level of grey, with fractions, whose L scikit-image finds in a picture."""
    greys = rgb2lab(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2))[0, :, 0]
    return np.interp(rgb2lab(rgb)[..., 0], greys, np.arange(256))


# Lab ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.006), (torch.float32, 0.007)])
def test_lab_is_that_of_scikit_image(dtype, tolerance):
    """Its white point is rounded to five digits, which moves a and b by up to 0.005 units."""
    rgb = pixels()
    ours = rgb_to_lab(torch.from_numpy(rgb).to(dtype) / 255, -1)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.numpy(), rgb2lab(rgb), atol=tolerance)


def test_rgb_from_lab_is_that_of_scikit_image_inside_the_gamut():
    lab = rgb2lab(pixels())
    back = lab_to_rgb(torch.from_numpy(lab), -1).numpy()
    np.testing.assert_allclose(back, lab2rgb(lab), atol=1e-3)  # a quarter of a level


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_colour_comes_back_to_the_bit(dtype):
    rgb = torch.from_numpy(pixels())
    back = lab_to_rgb(rgb_to_lab(rgb.to(dtype) / 255, -1), -1)
    assert torch.equal((back * 255).round().byte(), rgb)


def test_the_channel_may_stand_anywhere_and_greys_have_no_colour():
    rgb = torch.from_numpy(pixels((4, 5))).double() / 255
    last = rgb_to_lab(rgb, -1)
    torch.testing.assert_close(rgb_to_lab(rgb.permute(2, 0, 1)), last.permute(2, 0, 1))
    greys = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None].expand(-1, 3)
    lab = rgb_to_lab(greys, -1)
    assert lab[:, 1:].abs().max() < 1e-9
    assert lab[[0, -1], 0].tolist() == pytest.approx([0, 100])


def test_gamma_undoes_linear():
    values = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(gamma(linear(values)), values, atol=1e-7, rtol=0)


# Luminance ---------------------------------------------------------------------------------------------------------


def test_the_grey_of_a_picture_has_its_luminance_and_a_grey_picture_is_its_own():
    rgb = pixels()
    grey = to_grey(rgb)
    assert grey.dtype == np.uint8
    assert (grey == grey[..., :1]).all()
    assert np.abs(level(rgb) - grey[..., 0]).max() < 0.52
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    assert np.array_equal(to_grey(levels), levels)


@pytest.mark.parametrize("spread", [0.0, 10.0, 40.0, 150.0])
def test_a_coloured_picture_keeps_the_luminance_within_one_level_also_outside_the_gamut(spread):
    grey = to_grey(pixels())
    ab = torch.randn(2, *grey.shape[:2]) * spread
    coloured = colour_frame(grey, ab)
    assert np.abs(level(coloured) - grey[..., 0]).max() <= 1.0
    assert np.abs(to_grey(coloured).astype(int) - grey).max() <= 1
    assert np.array_equal(coloured, grey) == (spread == 0.0)


def test_a_colour_inside_the_gamut_is_kept_and_one_outside_keeps_its_hue():
    rgb = pixels()
    lab = rgb_to_lab(torch.from_numpy(rgb).double() / 255, -1)
    grey = to_grey(rgb)
    back = colour_frame(grey, lab[..., 1:].permute(2, 0, 1))
    assert np.abs(back.astype(int) - rgb).mean() < 1.5  # the grey's own rounding
    wild = torch.tensor([50.0, 90.0, -20.0], dtype=torch.float64)
    light, grey_light = linear(lab_to_rgb(wild, 0)), linear(lab_to_rgb(wild * torch.tensor([1.0, 0, 0]), 0))
    assert light.min() < 1e-6 or light.max() > 1 - 1e-6  # on the border of the gamut
    assert rgb_to_lab(lab_to_rgb(wild, 0), 0)[0] == pytest.approx(50.0, abs=1e-6)
    assert (light - grey_light)[0] > 0 > (light - grey_light)[1]


# Cells -------------------------------------------------------------------------------------------------------------


def test_cells_lie_on_the_grid_and_hold_every_colour():
    centres = cells.cells()
    assert (centres % cells.GRID == 0).all()
    assert len(centres.unique(dim=0)) == len(centres) == 261
    lab = torch.from_numpy(rgb2lab(pixels((300, 300)))[..., 1:]).float()
    assert set(map(tuple, ((lab / 10).round() * 10).reshape(-1, 2).tolist())) <= set(map(tuple, centres.tolist()))


def test_a_colour_comes_back_from_its_cell_within_half_a_cell():
    ab = torch.from_numpy(rgb2lab(pixels((300, 300), 1))[..., 1:])
    back = cells.decode(cells.nearest(ab))
    assert (back - ab).abs().max() <= cells.GRID / 2 + 1e-4
    assert torch.equal(cells.nearest(cells.cells()), torch.arange(len(cells.cells())))


def test_soft_weights_are_a_gaussian_on_the_five_nearest_cells():
    ab = torch.tensor([[13.0, -4.0], [0.0, 0.0], [-55.0, 31.0]])
    index, weights = cells.soft(ab)
    for colour_, found, share in zip(ab, index, weights, strict=True):
        distance = (cells.cells() - colour_).norm(dim=1)
        assert sorted(distance[found].tolist()) == pytest.approx(sorted(distance.tolist())[:5])
        expected = torch.exp(-distance[found].square() / 50)
        torch.testing.assert_close(share, expected / expected.sum())


def test_the_annealed_mean_lies_between_the_mean_and_the_mode():
    logits = torch.zeros(1, len(cells.cells()), 1, 2)
    a, b = cells.nearest(torch.tensor([[20.0, 0.0], [60.0, 0.0]])).tolist()
    logits[0, a], logits[0, b] = 20.0, 19.0
    found = [cells.annealed_mean(logits, t)[0, 0, 0, 0].item() for t in (1.0, 0.38, 0.01)]
    share = [1 / (1 + np.exp(1 / t)) for t in (1.0, 0.38)]
    assert found[0] == pytest.approx(20 + 40 * share[0], abs=0.1)
    assert found[1] == pytest.approx(20 + 40 * share[1], abs=0.1)
    assert found[2] == pytest.approx(20.0, abs=1e-3)


def test_rare_cells_weigh_more_and_the_mean_weight_is_one():
    counts = torch.zeros(len(cells.cells()))
    grey, red = cells.nearest(torch.tensor([[0.0, 0.0], [60.0, 40.0]])).tolist()
    counts[grey], counts[red] = 990.0, 10.0
    weights = cells.rebalancing(counts)
    assert weights[red] > 5 * weights[grey]
    kernel = torch.exp(-torch.cdist(cells.cells(), cells.cells()).square() / 50)
    smooth = (kernel / kernel.sum(0)) @ counts / counts.sum()
    assert (smooth * weights).sum().item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(cells.rebalancing(counts, uniform=1.0), torch.ones(len(counts)))


def test_the_loss_is_the_weighted_cross_entropy_to_the_soft_targets():
    q = len(cells.cells())
    logits, ab = torch.randn(2, q, 3, 4), torch.randn(2, 2, 3, 4) * 20
    weights = torch.rand(q) + 0.5
    index, share = cells.soft(ab.movedim(1, -1))
    target = torch.zeros(2, 3, 4, q).scatter(-1, index, share).movedim(-1, 1)
    pixel = weights[index[..., 0]]
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none").mul(pixel).sum() / pixel.sum()
    torch.testing.assert_close(cells.soft_cross_entropy(logits, ab, weights), expected)
