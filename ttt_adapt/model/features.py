"""Turn what an encoder returns into feature maps.

Encoders return a tensor, or lists, tuples and dicts of tensors: maps [B, C, h, w], channels-last maps [B, h, w, C], or
tokens [B, N, C] with or without prefix tokens. `describe` finds the layout once, on a random image; `to_maps` applies
it to every later pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ttt_adapt.errors import EncoderError

MAX_PREFIX = 16
"""More leading tokens than this are not taken for prefix tokens; known models have fewer."""


@dataclass(frozen=True)
class MapSpec:
    """One feature map of an encoder.

    Attributes:
        index: which of the encoder's output tensors, in flattened order.
        layout: "nchw", "nhwc" or "tokens" ([B, prefix + h * w, C]).
        channels: C.
        stride: image pixels per feature cell, the same in both directions.
        prefix: leading tokens that are no patches (class, registers); 0 for maps.
    """

    index: int
    layout: Literal["nchw", "nhwc", "tokens"]
    channels: int
    stride: int
    prefix: int = 0


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


def describe(output: Any, image_size: tuple[int, int], token_stride: int | None) -> list[MapSpec]:
    """Find the feature maps in an encoder's output: finest first, one per stride.

    Args:
        output: what the encoder returned for images of `image_size`.
        image_size: (H, W) of the images.
        token_stride: stride of the first convolution, which says how many tokens are patches; None without one.

    Raises:
        EncoderError: nothing in the output has the layout of a feature map.
    """
    found: dict[int, MapSpec] = {}
    shapes = []
    for index, tensor in enumerate(tensors(output)):
        shapes.append(tuple(tensor.shape))
        spec = describe_map(tuple(tensor.shape), image_size, token_stride, index)
        if spec is not None:
            found[spec.stride] = spec
    if not found:
        raise EncoderError(
            f"the encoder returned {shapes or type(output).__name__} for images of {image_size[0]} x {image_size[1]}; "
            "expected feature maps [B, C, h, w] or [B, h, w, C], or tokens [B, N, C]: "
            "name an earlier module, before the features are pooled"
        )
    return [found[stride] for stride in sorted(found)]


def describe_map(
    shape: tuple[int, ...], image_size: tuple[int, int], stride: int | None, index: int = 0
) -> MapSpec | None:
    """The layout of a tensor of this shape; None if it is not a feature map.

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
    """The encoder's output as maps [B, C, h, w] in the order of `specs`, for images of `image_size` (H, W)."""
    leaves = list(tensors(output))
    maps = []
    for spec in specs:
        tensor = leaves[spec.index]
        if spec.layout == "nhwc":
            tensor = tensor.permute(0, 3, 1, 2)  # [B, h, w, C] -> [B, C, h, w]
        elif spec.layout == "tokens":
            grid = (image_size[0] // spec.stride, image_size[1] // spec.stride)
            tensor = tensor[:, spec.prefix :].transpose(1, 2).unflatten(2, grid)  # [B, prefix + h * w, C] -> as above
        maps.append(tensor)
    return maps
