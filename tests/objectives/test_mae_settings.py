"""The patch size that fits a frame."""

from __future__ import annotations

import pytest

from ttt_adapt.objectives.mae_settings import patch_size_for


@pytest.mark.parametrize(
    ("size", "side"),
    [
        ((512, 1024), 16),  # the paper
        ((1024, 512), 16),
        ((192, 256), 8),
        ((256, 192), 8),
        ((144, 192), 4),
        ((96, 160), 4),
        ((384, 1248), 16),
        ((320, 480), 8),
    ],
)
def test_a_patch_is_the_power_of_two_nearest_to_a_32th_of_the_shorter_side(size, side):
    assert patch_size_for(size) == side


@pytest.mark.parametrize(("size", "side"), [((1, 1), 4), ((16, 2000), 4), ((2160, 3840), 16)])
def test_patches_have_4_to_16_pixels_however_small_or_large_a_frame_is(size, side):
    assert patch_size_for(size) == side
