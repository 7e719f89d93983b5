"""mmcv's deformable RoI pooling (Dai et al. 2017): RoIAlign whose cells move by learned offsets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_adapt_openmmlab.ops.formula import fill, gradients
from ttt_adapt_openmmlab.ops.regions import sample_grids


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fill `output` with the mean of each cell's samples.

    Args:
        input: [B, C, H, W].
        rois: [N, 5]: the index of the image, x1, y1, x2, y2.
        offset: [N, 2, h, w]: the steps (x, y) of each cell, in widths and heights of the region; or empty.
        output: [N, C, h, w].
        pooled_height: h.
        pooled_width: w.
        spatial_scale: feature map over image.
        sampling_ratio: samples per cell and direction; 0 takes as many as the cell has pixels, rounded up.
        gamma: a factor of the offsets.
    """
    pool = _pool(rois, (pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma)
    fill(output, pool, input, *([offset] if offset.numel() else []))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fill the gradients of input and offset; the arguments are those of `deform_roi_pool_forward`."""
    pool = _pool(rois, (pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma)
    given, filled = [input], [grad_input]
    if offset.numel():
        given, filled = [*given, offset], [*filled, grad_offset]
    for tensor, gradient in zip(filled, gradients(pool, given, grad_output), strict=True):
        tensor.copy_(gradient)


def _pool(
    rois: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, gamma: float
) -> Callable[..., Tensor]:
    """The pooling of (input, offset), or of the input alone."""

    def pool(x: Tensor, offset: Tensor | None = None) -> Tensor:
        boxes = rois.to(x.dtype)
        moves = x.new_zeros(len(rois), 2, *size) if offset is None else gamma * offset
        output = x.new_zeros(len(rois), x.shape[1], *size)
        for chosen, rows, columns in sample_grids(boxes, size, scale, sampling_ratio, aligned=True):
            for image in boxes[chosen, 0].unique().long():
                some = chosen[boxes[chosen, 0] == image]
                y, z = _samples(boxes[some, 1:] * scale - 0.5, moves[some], size, (rows, columns))
                output = output.index_copy(0, some, _bilinear(x[image], y, z).mean((-2, -1)).transpose(0, 1))
        return output

    return pool


def _samples(boxes: Tensor, moves: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows and columns of all samples of boxes [N, 4], each [N, h, w, rows, columns]."""
    places = []
    for axis, (cells, samples) in enumerate(zip(size[::-1], grid[::-1], strict=True)):  # x, then y
        start, extent = boxes[:, axis], boxes[:, axis + 2] - boxes[:, axis]
        within = (torch.arange(samples, device=boxes.device, dtype=boxes.dtype) + 0.5) / samples
        step = (torch.arange(cells, device=boxes.device)[:, None] + within) / cells  # [cells, samples], of the extent
        step = step[None, None, :, None, :] if axis == 0 else step[None, :, None, :, None]
        moved = step + moves[:, axis, :, :, None, None]
        places.append(start.view(-1, 1, 1, 1, 1) + extent.view(-1, 1, 1, 1, 1) * moved)
    z, y = torch.broadcast_tensors(*places)
    return y, z


def _bilinear(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Samples of [C, H, W] between pixels, [C, ...]; those more than one pixel outside are 0."""
    height, width = plane.shape[-2:]
    outside = (y < -1) | (y > height) | (x < -1) | (x > width)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1).view(1, 1, -1, 2)
    found = F.grid_sample(plane[None], grid, padding_mode="border", align_corners=False)
    return found.view(len(plane), *y.shape) * ~outside
