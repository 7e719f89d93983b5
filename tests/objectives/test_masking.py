from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_adapt.errors import ConfigError
from ttt_adapt.objectives.masking import (
    count_visible,
    denormalise_patches,
    hidden_patches,
    normalise_patches,
    pad_to_multiple,
    patch_grid,
    patchify,
    random_mask,
    unpatchify,
    upsample_mask,
    visible_pixels,
    visible_tokens_first,
)

GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12)).filter(lambda grid: grid[0] * grid[1] >= 2)
RATIOS = st.floats(0.01, 0.99)


@settings(deadline=None)
@given(GRIDS, RATIOS, st.integers(1, 5), st.integers(0, 2**31))
def test_every_image_hides_exactly_the_same_number_of_patches(grid, ratio, batch, seed):
    mask = random_mask(batch, grid, ratio, generator=torch.Generator().manual_seed(seed))
    patches = grid[0] * grid[1]
    assert mask.shape == (batch, *grid)
    assert mask.dtype == torch.bool
    hidden = (~mask).flatten(1).sum(1)
    assert hidden.unique().tolist() == [hidden_patches(patches, ratio)]
    assert abs(hidden_patches(patches, ratio) - ratio * patches) <= 1.0
    assert 1 <= hidden_patches(patches, ratio) <= patches - 1


@pytest.mark.parametrize(("patches", "ratio", "hidden"), [(10, 0.8, 8), (4, 0.01, 1), (4, 0.99, 3), (30, 0.8, 24)])
def test_the_share_is_rounded_and_leaves_something_on_both_sides(patches, ratio, hidden):
    assert hidden_patches(patches, ratio) == hidden


@pytest.mark.parametrize("patches", [0, 1])
def test_too_few_patches_are_an_error_that_says_what_to_do(patches):
    with pytest.raises(ConfigError, match=f"{patches} patch.*at least 2.*patch_size") as caught:
        hidden_patches(patches, 0.8)
    assert isinstance(caught.value, ValueError)


def test_masks_are_independent_within_and_between_batches():
    generator = torch.Generator().manual_seed(3)
    masks = torch.cat([random_mask(8, (10, 10), 0.8, generator=generator) for _ in range(2)])
    assert len({mask.numpy().tobytes() for mask in masks}) == 16


def test_every_patch_is_hidden_equally_often():
    masks = random_mask(4000, (3, 4), 0.75, generator=torch.Generator().manual_seed(0))
    share = (~masks).float().mean(0)
    assert (share - 0.75).abs().max() < 0.03


def test_pairs_of_patches_are_hidden_independently_of_where_they_lie():
    masks = (~random_mask(4000, (2, 4), 0.5, generator=torch.Generator().manual_seed(0))).float().flatten(1)
    together = masks.T @ masks / len(masks)
    others = together[~torch.eye(8, dtype=torch.bool)]
    assert (others - 4 * 3 / (8 * 7)).abs().max() < 0.04


def test_the_generator_decides_and_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    first = random_mask(4, (6, 7), 0.8, generator=torch.Generator().manual_seed(5))
    again = random_mask(4, (6, 7), 0.8, generator=torch.Generator().manual_seed(5))
    other = random_mask(4, (6, 7), 0.8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_patchify_equals_a_loop_over_patches():
    images = torch.arange(2 * 3 * 6 * 9).float().view(2, 3, 6, 9)
    patches = patchify(images, 3)
    n = 0
    for row in range(2):
        for column in range(3):
            block = images[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            for y in range(3):
                for x in range(3):
                    for c in range(3):
                        assert torch.equal(patches[:, n, (3 * y + x) * 3 + c], block[:, c, y, x])
            n += 1
    assert patches.shape == (2, n, 27)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_unpatchify_is_the_inverse_of_patchify(batch, channels, rows, columns, side):
    images = torch.randn(batch, channels, rows * side, columns * side)
    patches = patchify(images, side)
    assert patches.shape == (batch, rows * columns, side * side * channels)
    assert torch.equal(unpatchify(patches, side, (rows, columns)), images)


def test_patchify_refuses_what_is_no_multiple_and_says_the_sizes():
    with pytest.raises(ConfigError, match="17 x 32.*patch_size 16"):
        patchify(torch.zeros(1, 3, 17, 32), 16)


def test_an_upsampled_mask_covers_whole_patches():
    mask = torch.tensor([[[True, False, True], [False, True, False]]])
    pixels = upsample_mask(mask, 4)
    assert pixels.shape == (1, 1, 8, 12)
    for row in range(8):
        for column in range(12):
            assert pixels[0, 0, row, column] == mask[0, row // 4, column // 4]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
def test_padding_adds_zeros_at_the_bottom_and_right_only_where_needed(h, w, multiple):
    images = torch.rand(1, 3, h, w) + 1.0
    padded = pad_to_multiple(images, multiple)
    assert torch.equal(padded[..., :h, :w], images)
    assert padded.sum().item() == pytest.approx(images.sum().item(), rel=1e-5)
    assert padded.shape[-2] % multiple == padded.shape[-1] % multiple == 0
    assert padded.shape[-2] - h < multiple
    assert padded.shape[-1] - w < multiple
    assert (padded is images) == (h % multiple == 0 and w % multiple == 0)


@pytest.mark.parametrize("size", [(32, 48), (30, 41), (33, 49), (40, 60)])
def test_pixels_are_visible_with_their_patch_or_outside_of_all_patches(size):
    mask = random_mask(3, (2, 3), 0.5, generator=torch.Generator().manual_seed(1))
    pixels = visible_pixels(mask, 16, size)
    assert pixels.shape == (3, 1, *size)
    assert pixels.dtype == torch.bool
    for y in range(size[0]):
        for x in range(size[1]):
            outside = y >= 32 or x >= 48
            for i in range(3):
                assert pixels[i, 0, y, x] == (outside or mask[i, y // 16, x // 16])


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tokens_of_visible_patches_come_first_each_part_in_ascending_order(side):
    mask = random_mask(2, (3, 4), 0.75, generator=torch.Generator().manual_seed(2))
    order = visible_tokens_first(mask, side)
    for i in range(2):
        numbers = [(y, x) for y in range(3 * side) for x in range(4 * side)]
        visible = [n for n, (y, x) in enumerate(numbers) if mask[i, y // side, x // side]]
        assert order[i].tolist() == visible + [n for n in range(len(numbers)) if n not in visible]


def test_a_patch_that_the_image_fills_in_part_counts():
    assert patch_grid((32, 48), 16) == (2, 3)
    assert patch_grid((33, 47), 16) == (3, 3)


def test_normalised_patches_have_mean_zero_and_variance_one_and_go_back():
    images = 3 * torch.randn(2, 3, 20, 30, dtype=torch.float64) + 5
    normalised = normalise_patches(images, 8)
    assert normalised.shape == (2, 3, 24, 32)
    for y in range(0, 24, 8):
        for x in range(0, 32, 8):
            patch = normalised[0, :, y : y + 8, x : x + 8]
            assert patch.mean().item() == pytest.approx(0, abs=1e-9)
            assert patch.var().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(denormalise_patches(normalised[..., :20, :30], images, 8)[..., :20, :30], images)


def test_a_given_mask_has_the_right_shape_and_hides_the_same_number_everywhere():
    mask = random_mask(2, (2, 3), 0.5)
    assert count_visible(mask, (2, 2, 3)) == 3
    for wrong, message in (
        (mask[:1], r"mask is \(1, 2, 3\).*expected bool \(2, 2, 3\)"),
        (mask.float(), r"torch.float32; expected bool"),
        (torch.ones_like(mask), r"show \[6\] of 6 patches.*at least one hidden"),
        (torch.stack([mask[0], torch.zeros_like(mask[0])]), r"show \[0, 3\] of 6.*the same number in every image"),
    ):
        with pytest.raises(ConfigError, match=message):
            count_visible(wrong, (2, 2, 3))
