"""Feature maps of an encoder in one form.

Encoders return a tensor, or lists, tuples and dicts of tensors: maps [B, C, h, w], channels-last maps [B, h, w, C], or
tokens [B, N, C] with or without tokens that are no patches. `model/grid.py` finds out once which of them an encoder
returns; `to_maps` applies what was found to every later pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.errors import EncoderError

MAX_PREFIX = 16
"""More tokens than this are not taken for those beside the patches (class, registers); known models have fewer."""

Layout = Literal["nchw", "nhwc", "tokens", "tokens_first", "channels_first"]

TOKEN_AXES: dict[str, tuple[int, int, int]] = {
    "tokens": (0, 1, 2),
    "tokens_first": (1, 0, 2),
    "channels_first": (0, 2, 1),
}
"""Layout of tokens -> the order of its axes that makes it [B, N, C]."""


@dataclass(frozen=True)
class MapSpec:
    """One feature map of an encoder.

    Attributes:
        index: which of the encoder's output tensors, in flattened order.
        layout: "nchw" or "nhwc" for maps; for tokens "tokens" ([B, N, C]), "tokens_first" ([N, B, C]) or
            "channels_first" ([B, C, N]).
        channels: C.
        stride: image pixels per feature cell, the same in both directions.
        prefix: leading tokens that are no patches (class, registers); 0 for maps.
        middle: the same for tokens that stand between the first half of the patches and the second.
        suffix: the same for tokens behind the patches.
        by_columns: the patches come column by column, not row by row.
        own: the stride is small, and parameters act on this map that act on no coarser one.
    """

    index: int
    layout: Layout
    channels: int
    stride: int
    prefix: int = 0
    middle: int = 0
    suffix: int = 0
    by_columns: bool = False
    own: bool = False


class Features(NamedTuple):
    """What a decoder gets.

    Attributes:
        maps: [B, C_i, h_i, w_i] each, finest first.
        raw: what the encoder returned.
        image_size: (H, W) of the images that the encoder saw.
    """

    maps: list[Tensor]
    raw: Any
    image_size: tuple[int, int]


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of a nested output, depth first."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def describe_map(
    shape: tuple[int, ...], image_size: tuple[int, int], stride: int | None, index: int = 0
) -> MapSpec | None:
    """The layout of a tensor, as far as its shape tells; None if it is not a feature map.

    Args:
        shape: of the tensor.
        image_size: (H, W) of the images that it comes from.
        stride: side of a token in pixels; None: tokens are no map.
        index: which of the encoder's output tensors it is.
    """
    if len(shape) == 4:
        if step := _stride(image_size, shape[2:]):
            return MapSpec(index, "nchw", shape[1], step)
        if step := _stride(image_size, shape[1:3]):
            return MapSpec(index, "nhwc", shape[3], step)
    if len(shape) == 3 and stride:
        prefix = shape[1] - (image_size[0] // stride) * (image_size[1] // stride)
        if 0 <= prefix <= MAX_PREFIX:
            return MapSpec(index, "tokens", shape[2], stride, prefix)
    return None


def _stride(image: tuple[int, int], grid: tuple[int, ...]) -> int | None:
    """How many pixels of an image (H, W) one cell of a grid (h, w) covers in both directions; None if they differ.

    A grid of one cell is a pooled vector and has no stride.
    """
    if tuple(grid) == (1, 1):
        return None
    step = round(image[0] / grid[0])
    fits = step >= 1 and all(g in (size // step, -(-size // step)) for size, g in zip(image, grid, strict=True))
    return step if fits else None


def to_maps(output: Any, specs: list[MapSpec], image_size: tuple[int, int]) -> list[Tensor]:
    """The encoder's output as maps [B, C, h, w] in the order of `specs`, for images of `image_size` (H, W).

    A map that lacks a border of the image, as convolutions without padding leave it, is stretched to the whole image.

    Raises:
        EncoderError: another number of tokens than images of this size have, or another output than `specs` tell of.
    """
    leaves = list(tensors(output))
    maps = []
    for spec in specs:
        if spec.index >= len(leaves):
            raise EncoderError(f"{_OTHER_OUTPUT}: {len(leaves)} tensors; expected at least {spec.index + 1}{_WAY_OUT}")
        tensor = leaves[spec.index]
        if spec.layout == "nhwc":
            tensor = tensor.permute(0, 3, 1, 2)  # [B, h, w, C] -> [B, C, h, w]
        elif spec.layout != "nchw":
            tensor = _token_map(tensor, spec, image_size)
        if tensor.ndim != 4 or tensor.shape[1] != spec.channels:
            raise EncoderError(f"{_OTHER_OUTPUT}: {tuple(tensor.shape)}; expected {spec.channels} channels{_WAY_OUT}")
        whole, started = grid_of(image_size, spec.stride)
        if any(side not in sides for side, *sides in zip(tensor.shape[-2:], whole, started, strict=True)):
            tensor = F.interpolate(tensor, started, mode="bilinear", align_corners=False)
        maps.append(tensor)
    return maps


_OTHER_OUTPUT = "the encoder returned something else than when it was examined, in evaluation mode"
_WAY_OUT = ": name a module as the encoder that returns the same in training and in evaluation"


def grid_of(image_size: tuple[int, int], stride: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of cells in an image of (H, W): whole cells only, and with those that it fills in part."""
    h, w = image_size
    return (h // stride, w // stride), (-(-h // stride), -(-w // stride))


def patch_tokens(tokens: Tensor, spec: MapSpec) -> Tensor:
    """Tokens in the layout of `spec` -> those of the patches alone, [B, N, C]."""
    tokens = tokens.permute(TOKEN_AXES[spec.layout])
    tokens = tokens[:, spec.prefix : tokens.shape[1] - spec.suffix]
    if not spec.middle:
        return tokens
    half = (tokens.shape[1] - spec.middle) // 2
    return torch.cat([tokens[:, :half], tokens[:, half + spec.middle :]], 1)


def _token_map(tokens: Tensor, spec: MapSpec, image_size: tuple[int, int]) -> Tensor:
    """Tokens in the layout of `spec` -> [B, C, h, w]."""
    patches = patch_tokens(tokens, spec).transpose(1, 2)  # [B, C, h * w]
    grids = grid_of(image_size, spec.stride)
    grid = next((g for g in grids if g[0] * g[1] == patches.shape[2]), None)
    if grid is None:
        expected = " or ".join(str(n) for n in sorted({h * w for h, w in grids}))
        raise EncoderError(
            f"the encoder returned {patches.shape[2]} patch tokens for images of {image_size[0]} x {image_size[1]} "
            f"(H x W); expected {expected}, one for {spec.stride} x {spec.stride} pixels"
        )
    if spec.by_columns:
        return patches.unflatten(2, grid[::-1]).transpose(2, 3)
    return patches.unflatten(2, grid)


def from_map(cells: Tensor, spec: MapSpec, like: Tensor) -> Tensor:
    """A map [B, C, h, w] in the layout of `spec` and the shape of `like`; 0 in tokens that are no patches."""
    if spec.layout == "nchw":
        return cells
    if spec.layout == "nhwc":
        return cells.permute(0, 2, 3, 1)
    patches = (cells.transpose(2, 3) if spec.by_columns else cells).flatten(2).transpose(1, 2)  # [B, h * w, C]
    half = patches.shape[1] // 2 if spec.middle else 0
    first, second = F.pad(patches[:, :half], (0, 0, 0, spec.middle)), patches[:, half:]
    tokens = F.pad(torch.cat([first, second], 1), (0, 0, spec.prefix, spec.suffix))
    axes = TOKEN_AXES[spec.layout]  # each of these orders is its own inverse
    return tokens.permute(axes).reshape(like.shape)
