"""Inputs of deformable attention, and its formula written out: every pixel of a level times the two hat functions."""

from __future__ import annotations

import torch
from torch import Tensor

PYRAMID = [(2, 3), (4, 5), (7, 9)]
RAGGED = [(1, 1), (5, 1), (1, 7), (3, 4)]


def inputs(
    levels: list[tuple[int, int]], dim: int, dtype: torch.dtype = torch.float64, queries: int = 7, points: int = 2
) -> list[Tensor]:
    """Values, level sizes, locations (a third of them outside) and weights; 2 images, 2 heads.

    No sample lies on a row or column of pixel centres, where the formula has no derivative."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    shapes, place = torch.tensor(levels), (2, queries, 2, len(levels), points)
    value = rand(2, int(shapes.prod(1).sum()), 2, dim) - 0.5
    locations = (1.6 * rand(*place, 2) - 0.3).to(dtype)
    pixels = locations.double() * shapes.flip(1)[:, None] - 0.5
    locations[(pixels - pixels.round()).abs() < 1e-3] = 0.37
    return [value.to(dtype), shapes, locations, rand(*place).to(dtype)]


def formula(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """[B, Q, heads * dim]; a pixel counts with (1 - |distance|) along each axis, and not from a distance of 1 on."""
    total, at = torch.zeros(()), 0
    for level, (height, width) in enumerate(shapes.tolist()):
        pixels = value[:, at : at + height * width].unflatten(1, (height, width))
        at += height * width
        x, y = (locations[:, :, :, level] * torch.tensor([width, height]) - 0.5).unbind(-1)
        across = (1 - (x[..., None] - torch.arange(width)).abs()).clamp(min=0)
        down = (1 - (y[..., None] - torch.arange(height)).abs()).clamp(min=0)
        share = weights[:, :, :, level, :, None, None] * down[..., None] * across[..., None, :]
        total = total + torch.einsum("bqhpij,bijhd->bqhd", share, pixels)
    return total.flatten(2)


def exact(arguments: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The formula in float64: result, a gradient of the result (in the values' dtype), gradients of the arguments."""
    value, shapes, locations, weights = arguments
    leaves = [t.detach().double().requires_grad_() for t in (value, locations, weights)]
    out = formula(leaves[0], shapes, leaves[1], leaves[2])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(value.dtype)
    return out.detach(), grad, list(torch.autograd.grad(out, leaves, grad.double()))


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest difference, in units of the largest value: an error of sums, and one rounding of the result."""


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal within the dtype's tolerance, relative to the largest value."""
    assert got.shape == expected.shape
    assert expected.abs().max() > 0
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], float(error)
