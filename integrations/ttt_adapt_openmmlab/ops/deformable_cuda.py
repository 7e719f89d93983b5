"""Multi-scale deformable attention on a GPU: two Triton kernels, forward and backward.

A program holds a tile of queries of one head: [BLOCK_Q, BLOCK_D] of channels, masked where the head's width is no power
of two. Everything is accumulated in float32, or in float64 where the values are. Level sizes are read on the device, so
that no call waits for the device.

The gradient of the values is scattered. Atomic additions of floats come in any order, and its last bits vary with it;
under `torch.use_deterministic_algorithms(True)` the sum is one of 64-bit integers instead, which is the same in every
order: a common power of two, chosen on the device, scales the largest possible sum into their range.
"""

# The arguments of a kernel are pointers, which only Triton has types for.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Elements of a tile, queries x channels."""


@triton.jit
def _axis(locations, there, size, ACC: tl.constexpr):
    """The lower of two neighbours along an axis, and the share of the upper; far outside is moved to just outside."""
    position = tl.load(locations, mask=there, other=0.0).to(ACC) * size - 0.5
    position = tl.clamp(position, -2.0, size.to(ACC), propagate_nan=tl.PropagateNan.ALL)
    low = tl.floor(position)
    return low.to(tl.int32), position - low


@triton.jit
def _cell(start, row, column, height, width, there, tokens):
    """The token of a pixel, and whether there is such a pixel."""
    token = start + row * width + column
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return token.to(tl.int64), there & inside & (token < tokens)


@triton.jit
def _read(value, token, known, channel, ROW: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr):
    """Channels of a token for every query of the tile, 0 outside of the level."""
    mask = known[:, None] & (channel < DIM)[None, :]
    return tl.load(value + token[:, None] * ROW + channel[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def forward_kernel(
    value, shapes, locations, weights, out, tokens, queries,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The weighted sum of bilinear samples, for a tile of queries of one head."""
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, there = tl.arange(0, BLOCK_D), query < queries
    value += (batch * tokens * HEADS + head) * DIM
    place = (batch * queries + query) * HEADS + head
    total = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    start = 0
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        for point in tl.static_range(POINTS):
            sample = (place * LEVELS + level) * POINTS + point
            weight = tl.load(weights + sample, mask=there, other=0.0).to(ACC)
            x, right = _axis(locations + 2 * sample, there, width, ACC)
            y, lower = _axis(locations + 2 * sample + 1, there, height, ACC)
            for down in tl.static_range(2):
                for across in tl.static_range(2):
                    token, known = _cell(start, y + down, x + across, height, width, there, tokens)
                    tile = _read(value, token, known, channel, HEADS * DIM, DIM, ACC)
                    share = (lower if down else 1.0 - lower) * (right if across else 1.0 - right)
                    total += (weight * share)[:, None] * tile
        start += height * width
    mask = there[:, None] & (channel < DIM)[None, :]
    tl.store(out + place[:, None] * DIM + channel[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scatter(target, tile, token, known, channel, scale, ROW: tl.constexpr, DIM: tl.constexpr, FIXED: tl.constexpr):
    """Add a tile to the gradient of the values."""
    mask = known[:, None] & (channel < DIM)[None, :]
    place = target + token[:, None] * ROW + channel[None, :]
    if FIXED:
        tl.atomic_add(place, (tile * scale).to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(place, tile, mask=mask, sem="relaxed")


@triton.jit
def backward_kernel(
    grad, value, shapes, locations, weights, grad_value, grad_locations, grad_weights, scales, tokens, queries,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Gradients for a tile of queries of one head: values are added up, locations and weights are written."""
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, there = tl.arange(0, BLOCK_D), query < queries
    value += (batch * tokens * HEADS + head) * DIM
    grad_value += (batch * tokens * HEADS + head) * DIM
    place = (batch * queries + query) * HEADS + head
    mask = there[:, None] & (channel < DIM)[None, :]
    g = tl.load(grad + place[:, None] * DIM + channel[None, :], mask=mask, other=0.0).to(ACC)
    scale = tl.load(scales)
    start = 0
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        for point in range(POINTS):
            sample = (place * LEVELS + level) * POINTS + point
            weight = tl.load(weights + sample, mask=there, other=0.0).to(ACC)
            x, right = _axis(locations + 2 * sample, there, width, ACC)
            y, lower = _axis(locations + 2 * sample + 1, there, height, ACC)
            along_x = tl.zeros([BLOCK_Q], ACC)
            along_y = tl.zeros([BLOCK_Q], ACC)
            along_weight = tl.zeros([BLOCK_Q], ACC)
            for down in tl.static_range(2):
                for across in tl.static_range(2):
                    token, known = _cell(start, y + down, x + across, height, width, there, tokens)
                    tile = _read(value, token, known, channel, HEADS * DIM, DIM, ACC)
                    dot = tl.sum(tile * g, 1)
                    share_y = lower if down else 1.0 - lower
                    share_x = right if across else 1.0 - right
                    along_weight += share_y * share_x * dot
                    along_x += share_y * dot if across else -share_y * dot
                    along_y += share_x * dot if down else -share_x * dot
                    part = (weight * share_y * share_x)[:, None] * g
                    _scatter(grad_value, part, token, known, channel, scale, HEADS * DIM, DIM, FIXED)
            kind = grad_locations.dtype.element_ty
            tl.store(grad_locations + 2 * sample, (along_x * weight * width).to(kind), mask=there)
            tl.store(grad_locations + 2 * sample + 1, (along_y * weight * height).to(kind), mask=there)
            tl.store(grad_weights + sample, along_weight.to(grad_weights.dtype.element_ty), mask=there)
        start += height * width


def forward(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention; arguments as in `deformable_attention`, checked there.

    Returns:
        [B, Q, heads * dim], in the dtype of `value`.
    """
    value, shapes, locations, weights = (t.contiguous() for t in (value, shapes, locations, weights))
    out = value.new_zeros(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    if out.numel():
        grid, sizes = _launch(value, locations)
        with _device(value):
            forward_kernel[grid](value, shapes, locations, weights, out, value.shape[1], locations.shape[1], **sizes)
    return out


def backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, locations and weights from the gradient [B, Q, heads * dim] of the result."""
    grad, value, shapes, locations, weights = (t.contiguous() for t in (grad, value, shapes, locations, weights))
    grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
    if not grad.numel():
        return torch.zeros_like(value), grad_locations, grad_weights
    fixed = torch.are_deterministic_algorithms_enabled()
    grid, sizes = _launch(value, locations)
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    scale, finite = _fixed_point(grad, weights, exact) if fixed else (value.new_ones((), dtype=exact), None)
    grad_value = torch.zeros_like(value, dtype=torch.int64 if fixed else exact)
    with _device(value):
        backward_kernel[grid](
            grad, value, shapes, locations, weights, grad_value, grad_locations, grad_weights, scale,
            value.shape[1], locations.shape[1], **sizes, FIXED=fixed,
        )  # fmt: skip
    if finite is not None:
        grad_value = torch.where(finite, grad_value / scale.double(), torch.nan)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _fixed_point(grad: Tensor, weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factor that takes every possible sum below 2^61, and whether the sums are finite at all; on the device.

    A pixel gets at most one contribution of a sample, none larger than the largest gradient times the largest weight.
    """
    samples = weights.shape[1] * weights.shape[3] * weights.shape[4]
    bound = grad.abs().amax().double() * weights.abs().amax().double() * samples
    exponent = (61 - bound.log2().ceil()).clamp(-126, 126)
    return torch.exp2(exponent).to(dtype), bound.isfinite()


def _launch(value: Tensor, locations: Tensor) -> tuple[tuple[int, int, int], dict[str, object]]:
    """The grid of programs (tiles of queries, heads, batch), and the constants that a kernel is compiled for."""
    batch, queries, heads, levels, points, _ = locations.shape
    dim = value.shape[3]
    block_d = triton.next_power_of_2(dim)
    block_q = max(1, TILE // block_d)
    sizes = {
        "HEADS": heads,
        "DIM": dim,
        "LEVELS": levels,
        "POINTS": points,
        "ACC": tl.float64 if value.dtype == torch.float64 else tl.float32,
        "BLOCK_Q": block_q,
        "BLOCK_D": block_d,
    }
    return (triton.cdiv(queries, block_q), heads, batch), sizes


def _device(value: Tensor) -> AbstractContextManager:
    """The device that a kernel is launched on; the interpreter has none."""
    return torch.cuda.device(value.device) if value.is_cuda else nullcontext()
