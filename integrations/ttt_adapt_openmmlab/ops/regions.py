"""mmcv's operators on regions of interest: RoIAlign (mean and maximum) and RoIPool.

Regions are [N, 5]: the index of the image, then x1, y1, x2, y2 in its pixels, which `spatial_scale` turns into those
of the feature map.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import ops

from ttt_adapt_openmmlab.ops.formula import fill, gradients, wide

MAXIMUM = 0  # mmcv's number of the mode; 1 is the mean


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `output` with RoIAlign (He et al. 2017).

    Args:
        input: [B, C, H, W].
        rois: [N, 5].
        output: [N, C, h, w].
        argmax_y: [N, C, h, w] in the mode "maximum": gets the row of the largest sample of each cell.
        argmax_x: the same for columns.
        aligned_height: h.
        aligned_width: w.
        spatial_scale: feature map over image.
        sampling_ratio: samples per cell and direction; 0 takes as many as the cell has pixels, rounded up.
        pool_mode: 0 for the maximum of the samples, 1 for their mean.
        aligned: whether pixel centres are at half numbers; without it, a region is at least 1 x 1.
    """
    size = aligned_height, aligned_width
    rois = rois.to(wide(input).dtype)
    if pool_mode != MAXIMUM:
        fill(output, lambda x: ops.roi_align(x, rois, size, spatial_scale, sampling_ratio, aligned), input)
        return
    output.fill_(torch.finfo(torch.float32).min)  # where a region without area has no samples
    for chosen, rows, columns in sample_grids(rois, size, spatial_scale, sampling_ratio, aligned):
        samples = _samples(wide(input), rois[chosen], size, (rows, columns), spatial_scale, aligned)
        largest, place = F.max_pool2d(samples, (rows, columns), return_indices=True)
        width = samples.shape[-1]
        output[chosen] = largest.to(output.dtype)
        argmax_y[chosen] = (place // width % rows).to(argmax_y.dtype)
        argmax_x[chosen] = (place % width % columns).to(argmax_x.dtype)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `grad_input` [B, C, H, W]; the other arguments are those of `roi_align_forward`."""
    size = aligned_height, aligned_width
    rois = rois.to(wide(grad_input).dtype)
    if pool_mode != MAXIMUM:
        pool = lambda x: ops.roi_align(x, rois, size, spatial_scale, sampling_ratio, aligned)  # noqa: E731
        grad_input.copy_(gradients(pool, [grad_input], grad_output)[0])
        return
    for chosen, rows, columns in sample_grids(rois, size, spatial_scale, sampling_ratio, aligned):
        grid, some = (rows, columns), rois[chosen]
        cells = [torch.arange(count, device=rois.device) for count in size]
        y = cells[0][:, None] * rows + argmax_y[chosen].long()
        x = cells[1] * columns + argmax_x[chosen].long()
        place = y * (aligned_width * columns) + x
        spread = F.max_unpool2d(wide(grad_output[chosen]), place, grid)
        sample = lambda x, some=some, grid=grid: _samples(x, some, size, grid, spatial_scale, aligned)  # noqa: E731
        grad_input.add_(gradients(sample, [grad_input], spread)[0].to(grad_input.dtype))


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill `output` with RoIPool: the maximum of all pixels that a cell touches.

    torchvision rounds a region to whole pixels first, which mmcv does not, so this is a formula of its own.

    Args:
        input: [B, C, H, W].
        rois: [N, 5]; x2 and y2 are the last pixels of a region.
        output: [N, C, h, w]; 0 where a cell is outside.
        argmax: int [N, C, h, w]; gets the index of the largest pixel, y * W + x, or -1.
        pooled_height: h.
        pooled_width: w.
        spatial_scale: feature map over image.
    """
    height, width = input.shape[-2:]
    rois = rois.to(wide(input).dtype)
    low, high = rois[:, 1:3] * spatial_scale, (rois[:, 3:5] + 1) * spatial_scale
    pieces = zip(
        _pixels(low[:, 1], high[:, 1], pooled_height, height),
        _pixels(low[:, 0], high[:, 0], pooled_width, width),
        strict=True,
    )
    for index, ((rows, some_rows), (columns, some_columns)) in enumerate(pieces):
        image = wide(input[int(rois[index, 0])])
        place = rows[:, None, :, None] * width + columns[None, :, None, :]  # [h, w, rows of a cell, columns of it]
        values, which = image.flatten(1)[:, place.flatten(2)].max(-1)  # [C, h, w]
        inside = some_rows[:, None] & some_columns
        where = place.flatten(2).expand(*which.shape, -1).gather(-1, which[..., None])[..., 0]
        output[index] = torch.where(inside, values, 0).to(output.dtype)
        argmax[index] = torch.where(inside, where, -1).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill `grad_input` [B, C, H, W] from `argmax`; the other arguments are those of `roi_pool_forward`."""
    batch, channels, height, width = grad_input.shape
    image = rois[:, 0].long()[:, None, None, None] * channels
    plane = image + torch.arange(channels, device=rois.device)[:, None, None]
    place = plane * (height * width) + argmax.clamp(min=0)
    values = torch.where(argmax >= 0, wide(grad_output), 0)
    total = values.new_zeros(batch * channels * height * width)
    grad_input.copy_(total.scatter_add_(0, place.flatten(), values.flatten()).view_as(grad_input))


def sample_grids(
    rois: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool
) -> Iterator[tuple[Tensor, int, int]]:
    """Regions with the same number of samples per cell: their indices, and the rows and columns of samples.

    Regions without area have no samples, and are left out.
    """
    extent = (rois[:, 3:5] - rois[:, 1:3]) * scale
    if not aligned:
        extent = extent.clamp(min=1)
    counts = torch.ceil(extent / extent.new_tensor(size[::-1])).long()
    if sampling_ratio > 0:
        counts = torch.full_like(counts, sampling_ratio)
    for columns, rows in counts.unique(dim=0).tolist():
        if rows > 0 and columns > 0:
            yield (counts == counts.new_tensor([columns, rows])).all(1).nonzero()[:, 0], rows, columns


def _samples(
    x: Tensor, rois: Tensor, size: tuple[int, int], grid: tuple[int, int], scale: float, aligned: bool
) -> Tensor:
    """All samples of regions, [N, C, h * rows, w * columns]: RoIAlign whose cells have one sample each."""
    return ops.roi_align(x, rois, (size[0] * grid[0], size[1] * grid[1]), scale, 1, aligned)


def _pixels(low: Tensor, high: Tensor, cells: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each region, the pixels of its cells along one axis: int64 [cells, most], and bool [cells] (any).

    A cell with fewer pixels than the largest repeats its last one.
    """
    step = (high - low)[:, None] / cells  # [N, 1]
    cell = torch.arange(cells, device=low.device)
    first = torch.floor(cell * step + low[:, None]).clamp(0, length).long()
    end = torch.ceil((cell + 1) * step + low[:, None]).clamp(0, length).long()
    some = (end > first) & (step > 0)
    for begin, stop, found in zip(first, end, some, strict=True):
        most = int((stop - begin).max().clamp(min=1))
        pixels = torch.minimum(begin[:, None] + torch.arange(most, device=low.device), stop[:, None] - 1)
        yield pixels.clamp(0, length - 1), found
