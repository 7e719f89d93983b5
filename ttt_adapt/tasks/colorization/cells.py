"""Colours as classes: cells of a grid over the ab plane of CIE Lab; a cell counts if a colour of sRGB lies in it.

Zhang, Isola and Efros, "Colorful Image Colorization" (ECCV 2016), section 2: a grid of 10 units, soft encoding,
rebalancing of rare colours, and the annealed mean. The cells are computed here from the gamut of sRGB.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.colour import rgb_to_lab

GRID = 10.0
"""Side of a cell, in units of a and b."""
NEIGHBOURS = 5
"""A colour is encoded as weights on this many cells."""
_SIGMA = 5.0  # of the Gaussian that gives these weights and smooths the statistics of colours, as in the paper
_REACH = 120
"""a and b of every colour of sRGB lie between minus and plus this number."""


@lru_cache(maxsize=1)
def cells() -> Tensor:
    """The centres of the cells, float32 [Q, 2], multiples of 10.

    A cell is kept if a colour of sRGB lies in it. The surface of the RGB cube has all a and b that occur: a colour that
    is moved along L keeps its a and b, and reaches the surface. The surface is sampled at 256 levels.
    """
    step = torch.arange(256, dtype=torch.float32) / 255
    u, v = (axis.reshape(-1) for axis in torch.meshgrid(step, step, indexing="ij"))
    faces = [
        torch.stack([torch.full_like(u, end) if axis == i else (u, v)[axis - (axis > i)] for axis in range(3)], -1)
        for i in range(3)
        for end in (0.0, 1.0)
    ]
    ab = rgb_to_lab(torch.cat(faces), -1)[:, 1:]
    return (ab / GRID).round().unique(dim=0) * GRID


def nearest(ab: Tensor) -> Tensor:
    """The cell that every colour lies in: [..., 2] -> int64 [...]; hard encoding.

    The centre of the cell is at most half a cell away in a and in b. A colour outside of sRGB gets the nearest cell.
    """
    return _look_up((ab / GRID).round() * GRID, _tables()[0])[..., 0]


def soft(ab: Tensor) -> tuple[Tensor, Tensor]:
    """Every colour as weights on its nearest cells: [..., 2] -> (int64 [..., 5], float [..., 5] with sum 1).

    Weights fall off as a Gaussian of 5 units. Colours are rounded to whole units first.
    """
    table, weights = _tables()
    return _look_up(ab, table), _look_up(ab, weights).to(ab.dtype)


def decode(cell: Tensor) -> Tensor:
    """The centre of a cell: int64 [...] -> float32 [..., 2]."""
    return cells().to(cell.device)[cell]


def annealed_mean(logits: Tensor, temperature: float = 0.38) -> Tensor:
    """The colours that scores of cells stand for: [B, Q, H, W] -> a and b, [B, 2, H, W]; equation 5 of the paper.

    Temperature 1 gives the mean, which is dull; towards 0 it gives the most likely cell, which is patchy.
    """
    return torch.einsum("bqhw,qc->bchw", (logits / temperature).softmax(1), cells().to(logits))


def rebalancing(counts: Tensor, uniform: float = 0.5) -> Tensor:
    """The weight of every cell in the loss: the rarer a colour, the larger its weight; equation 4 of the paper.

    The distribution of colours is smoothed by a Gaussian of 5 units over the plane, and mixed with the uniform
    distribution. A weight is the inverse of the result, scaled so that the mean weight of the pixels is 1.

    Args:
        counts: pixels in each cell, [Q].
        uniform: share of the uniform distribution.
    """
    centres = cells().double()
    kernel = torch.exp(-torch.cdist(centres, centres).square() / (2 * _SIGMA**2))
    smooth = (kernel / kernel.sum(0, keepdim=True)) @ counts.double()
    smooth = smooth / smooth.sum()
    weights = 1 / ((1 - uniform) * smooth + uniform / len(centres))
    return (weights / (smooth * weights).sum()).float()


def soft_cross_entropy(logits: Tensor, ab: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy to the soft encoding, each pixel weighted by its cell; equation 2 of the paper.

    Args:
        logits: [B, Q, H, W].
        ab: colours, [B, 2, H, W].
        weights: of the cells, [Q].
    """
    index, share = soft(ab.movedim(1, -1))
    likely = F.log_softmax(logits.movedim(1, -1), -1).gather(-1, index)
    pixel = weights.to(logits)[index[..., 0]]
    return -(pixel * (share * likely).sum(-1)).sum() / pixel.sum()


def _look_up(ab: Tensor, table: Tensor) -> Tensor:
    place = (ab.round().long() + _REACH).clamp(0, 2 * _REACH)
    return table.to(ab.device)[place[..., 0], place[..., 1]]


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    """For every whole a and b: the nearest cells, nearest first, and their weights, [2 R + 1, 2 R + 1, 5]."""
    axis = torch.arange(-_REACH, _REACH + 1, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    distance, index = torch.cdist(grid, cells()).topk(NEIGHBOURS, largest=False)
    weights = torch.exp(-distance.square() / (2 * _SIGMA**2) + distance[:, :1].square() / (2 * _SIGMA**2))
    shape = (len(axis), len(axis), NEIGHBOURS)
    return index.reshape(shape), (weights / weights.sum(1, keepdim=True)).reshape(shape)
