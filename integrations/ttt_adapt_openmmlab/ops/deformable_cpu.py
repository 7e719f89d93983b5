"""Multi-scale deformable attention on the CPU: weighted sums of rows of a table, by `F.embedding_bag`.

The table has a row for each pixel and head. All levels lie in it, one above the other, with lines as long as those of
the widest level. Two pixels after every line and two lines above and below every level are zero. A sample outside of
its level is moved to just outside, where it reads zeros, so that no corner needs a test. The first corner of a sample
is one row of the table, and the three others lie at fixed distances from it, so that one set of rows serves all four,
forward and backward. Other than `grid_sample` for each level, this writes no sampled values, and it reads all channels
of a pixel in one piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BORDER = 2
"""Zero pixels around a level. Both neighbours of a sample just outside of the level are among them."""
GROUP = 16384
"""Sums (query x head) that are computed together: few enough to fit into the caches, enough to be worth a call."""


class _Table:
    """Where the pixels of all levels lie in the table, and which rows a sample reads.

    Args:
        sizes: height and width of every level.
        heads: heads.
        points: points per level.
        dtype: that locations are computed in.
    """

    def __init__(self, sizes: list[tuple[int, int]], heads: int, points: int, dtype: torch.dtype) -> None:
        self.sizes, self.heads = sizes, heads
        self.line = max(width for _, width in sizes) + BORDER
        self.starts, self.pixels = [], BORDER
        for height, _ in sizes:
            self.starts.append(self.pixels)
            self.pixels += (height + 2 * BORDER) * self.line
        self.rows = self.pixels * heads
        self.corners = [distance * heads for distance in (0, 1, self.line, self.line + 1)]

        def per_sample(values: list[int], kind: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=kind).repeat_interleave(points).repeat(heads)

        self.heights = per_sample([height for height, _ in sizes], dtype)
        self.widths = per_sample([width for _, width in sizes], dtype)
        first = per_sample([(start + BORDER * self.line) * heads for start in self.starts], torch.int32)
        self.first = first + torch.arange(heads, dtype=torch.int32).repeat_interleave(len(sizes) * points)

    def levels(self, table: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every level in a table [B, rows, dim] and in values [B, S, heads, dim]: two views [B, h, w, heads, dim]."""
        batch, dim, at = table.shape[0], table.shape[2], 0
        pixels = table.view(batch, self.pixels, self.heads, dim)
        for (height, width), start in zip(self.sizes, self.starts, strict=True):
            lines = height + 2 * BORDER
            block = pixels[:, start : start + lines * self.line].view(batch, lines, self.line, self.heads, dim)
            flat = value[:, at : at + height * width].view(batch, height, width, self.heads, dim)
            yield block[:, BORDER : BORDER + height, :width], flat
            at += height * width

    def fill(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The table [B, rows, dim] of values [B, S, heads, dim]."""
        value = value.contiguous()
        table = value.new_zeros(value.shape[0], self.rows, value.shape[3], dtype=dtype)
        for inside, flat in self.levels(table, value):
            inside.copy_(flat)
        return table

    def read(self, table: Tensor, like: Tensor) -> Tensor:
        """The values [B, S, heads, dim] of a table; the border is dropped."""
        value = torch.empty_like(like, memory_format=torch.contiguous_format)
        for inside, flat in self.levels(table, value):
            flat.copy_(inside)
        return value

    def locate(self, locations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first row (int32) of every sample, and how far it lies to the right of it and below, in [0, 1).

        Args:
            locations: [G, Q, heads * levels * points, 2], (x, y) in units of the level.
        """
        column, right = _split(locations[..., 0], self.widths)
        line, lower = _split(locations[..., 1], self.heights)
        row = column.add_(line, alpha=self.line).to(torch.int32).mul_(self.heads).add_(self.first)
        row.clamp_(0, self.rows - 1 - self.corners[-1])  # a NaN gets any row; its weights are NaN, and so is the result
        row += torch.arange(len(row), dtype=torch.int32).view(-1, 1, 1) * self.rows
        return row, right, lower


def _split(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel before a position along an axis, and the rest; positions outside are pulled back to the border."""
    pixel = (position * size).sub_(0.5).clamp_(min=-BORDER)
    torch.minimum(pixel, size, out=pixel)
    before = pixel.floor()
    return before, pixel.sub_(before)


def _shares(weight: Tensor, right: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight of a sample, shared among its corners: upper left, upper right, lower left, lower right."""
    below = weight * lower
    above = weight - below
    above_right, below_right = above * right, below * right
    return above.sub_(above_right), above_right, below.sub_(below_right), below_right


def forward(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention; arguments as in `deformable_attention`, checked there.

    Returns:
        [B, Q, heads * dim], in the dtype of `value`.
    """
    batch, queries, heads, levels, points, _ = locations.shape
    exact, dim, samples = _exact(value), value.shape[3], levels * points
    out = value.new_zeros(batch, queries, heads * dim, dtype=exact)
    if out.numel() == 0:
        return out.to(value.dtype)
    table = _Table(shapes.tolist(), heads, points, exact)
    rows = table.fill(value, exact)
    for part in _groups(batch, queries * heads):
        row, right, lower = table.locate(_flat(locations[part], exact))
        first, known = row.view(-1, samples), rows[part].view(-1, dim)
        total = out[part].view(-1, dim)
        for distance, share in zip(table.corners, _shares(_flat(weights[part], exact), right, lower), strict=True):
            share = share.view(-1, samples)
            total += F.embedding_bag(first, known[distance:], per_sample_weights=share, mode="sum")
    return out.to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, locations and weights from the gradient [B, Q, heads * dim] of the result."""
    batch, queries, heads, _, points, _ = locations.shape
    exact, dim = _exact(value), value.shape[3]
    grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
    if grad.numel() == 0:
        return torch.zeros_like(value), grad_locations, grad_weights
    table = _Table(shapes.tolist(), heads, points, exact)
    rows = table.fill(value, exact)
    grad_rows = torch.zeros_like(rows)
    for part in _groups(batch, queries * heads):
        place = table.locate(_flat(locations[part], exact))
        weight, g = _flat(weights[part], exact), grad[part].to(exact).reshape(-1, dim)
        _scatter(grad_rows[part].view(-1, dim), g, table, place, weight)
        along = _along(rows[part].view(-1, dim), g, table, place, weight)
        grad_locations[part] = torch.stack(along[:2], -1).view_as(grad_locations[part])
        grad_weights[part] = along[2].view_as(grad_weights[part])
    return table.read(grad_rows, value), grad_locations, grad_weights


_Place = tuple[Tensor, Tensor, Tensor]


def _scatter(target: Tensor, grad: Tensor, table: _Table, place: _Place, weight: Tensor) -> None:
    """Add the gradient of the table: for each row the sum over the samples that read it, sorted by row for that."""
    row, right, lower = place
    ordered, order = row.view(-1).sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(len(target), dtype=torch.int32), out_int32=True)
    bag = order.to(torch.int32).div_(row.numel() // len(grad), rounding_mode="floor")
    for distance, share in zip(table.corners, _shares(weight, right, lower), strict=True):
        share = share.view(-1).index_select(0, order)
        begin = begins[: len(target) - distance]  # the last rows have no row at this distance
        target[distance:] += F.embedding_bag(bag, grad, begin, per_sample_weights=share, mode="sum")


def _along(known: Tensor, grad: Tensor, table: _Table, place: _Place, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients along x, y and the weight, from the products of each corner's pixel and the gradient of the sum."""
    row, right, lower = place
    samples = row.numel() // len(grad)
    begins = torch.arange(0, row.numel() + 1, samples, dtype=torch.int32)
    nothing = grad.new_zeros(row.numel())
    products = []
    for distance in table.corners:
        pixel = known[distance:]
        pattern = _sparse(begins, row.view(-1), nothing, (len(grad), len(pixel)))
        found = torch.sparse.sampled_addmm(pattern, grad, pixel.t(), beta=0)
        products.append(found.values().view_as(row))
    upper_left, upper_right, lower_left, lower_right = products
    above, below = torch.lerp(upper_left, upper_right, right), torch.lerp(lower_left, lower_right, right)
    along_weight = torch.lerp(above, below, lower)
    along_y = below.sub_(above).mul_(weight).mul_(table.heights)
    along_x = torch.lerp(upper_right.sub_(upper_left), lower_right.sub_(lower_left), lower)
    return along_x.mul_(weight).mul_(table.widths), along_y, along_weight


def _sparse(begins: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(begins, columns, values, size, check_invariants=False)


def _groups(batch: int, sums: int) -> Iterator[slice]:
    """Slices of the batch of about `GROUP` sums, at least one image each."""
    images = max(1, GROUP // sums)
    for begin in range(0, batch, images):
        yield slice(begin, begin + images)


def _flat(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, Q, heads, levels, points, ...] -> [G, Q, heads * levels * points, ...], in order in memory."""
    return samples.to(dtype).contiguous().flatten(2, 4)


def _exact(value: Tensor) -> torch.dtype:
    """The dtype of the computation: float64 for float64 values, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32
