"""The tones of an image: how dark and bright the pixels of each channel are, and a curve that changes it.

The tones of a channel are `LEVELS` of its quantiles. An image is corrected by the curve that takes its own levels a
share of the way to the source's: straight between two levels, and with a slope of one beyond the outermost. So one
curve per channel undoes exposure, contrast, gamma and a colour cast. With the whole share this is histogram matching
(Gonzalez and Woods, "Digital Image Processing", on histogram specification).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 9
EDGE = 0.02
"""The levels are the quantiles from here to one minus this, evenly spaced: single dead pixels do not count."""
SAMPLES = 1024
"""About so many pixels of each channel are looked at, on an even grid: a sort of more takes longer than a layer."""
STEEPEST = 8.0
"""The largest slope of a curve: a wall of one colour has no contrast that could be restored, only noise."""


def levels_of(x: Tensor) -> Tensor:
    """The levels of images x [B, C, H, W], all together: [C, LEVELS], float32 or wider, ascending."""
    step = max(1, math.isqrt(x.shape[0] * x.shape[2] * x.shape[3] // SAMPLES))
    pixels = x[:, :, ::step, ::step].transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    ordered = pixels.sort(1).values
    last = ordered.shape[1] - 1
    places = (EDGE + (1.0 - 2.0 * EDGE) * i / (LEVELS - 1) for i in range(LEVELS))
    return torch.stack([ordered[:, round(place * last)] for place in places], 1)


def tone_divergence(levels: Tensor, source: Tensor, source_std: Tensor) -> Tensor:
    """How far tones are from those of the source: [..., C], in squared deviations of a channel, mean over the levels.

    Args:
        levels: [..., C, LEVELS].
        source: [C, LEVELS].
        source_std: [C], above 0.
    """
    return ((levels - source) / source_std.unsqueeze(-1)).square().mean(-1)


def along_curve(x: Tensor, levels: Tensor, wanted: Tensor) -> Tensor:
    """Images whose `levels` have become the `wanted` ones; where both are the same, images equal to `x`.

    Levels that are one value cannot become several: they become their mean. Where the curve would be steeper than
    `STEEPEST`, levels come as near to the wanted ones as they can, too high and too low by as much.

    Args:
        x: [B, C, H, W].
        levels: [C, LEVELS], ascending.
        wanted: [C, LEVELS], ascending.
    """
    same = (levels.unsqueeze(1) == levels.unsqueeze(2)).to(levels)  # [C, LEVELS, LEVELS]
    moves = (same @ (wanted - levels).unsqueeze(2)).squeeze(2) / same.sum(2)  # [C, LEVELS], of one value alike
    steps = levels.diff(dim=1)
    heights = steps + moves.diff(dim=1)  # of the curve between two levels
    slopes = (heights / steps.clamp_min(torch.finfo(steps.dtype).tiny)).clamp_max(STEEPEST)
    bends = torch.where(steps > 0, slopes - 1.0, 0.0)  # [C, LEVELS - 1]
    missing = torch.where(steps > 0, heights - slopes * steps, 0.0)  # of the heights, where it is too steep
    share_of_levels = torch.arange(LEVELS - 1, 0, -1, device=x.device, dtype=levels.dtype) / LEVELS  # that lie above
    start = moves[:, 0] - (bends * levels[:, :-1]).sum(1) + (missing * share_of_levels).sum(1)
    curved = x + start.view(-1, 1, 1)
    for piece in range(LEVELS - 1):
        low, high, bend = (each.view(-1, 1, 1) for each in (levels[:, piece], levels[:, piece + 1], bends[:, piece]))
        curved = curved.addcmul_(torch.minimum(torch.maximum(x, low), high), bend)  # a clamp takes thrice as long
    return curved.to(x.dtype)
