"""Points of a model where the statistics of a frame can be measured and corrected.

There are three kinds. Each point has C channels, and a frame has one mean and one deviation per channel there, over
space.

| kind | where |
|---|---|
| "batchnorm" | the input of every layer with running statistics: the frame's own may replace a part of them |
| "norms" | the output of every other normalisation layer (LayerNorm, RMSNorm, GroupNorm, ...) |
| "blocks" | the output of the model's repeated blocks (of a ViT, Swin, ConvNeXt, ResNet) |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ttt_adapt.errors import EncoderError
from ttt_adapt.model.blocks import repeated_blocks
from ttt_adapt.model.features import describe_map, tensors
from ttt_adapt.model.hooks import hooks, uncompiled
from ttt_adapt.model.norms import channel_moments, is_norm, norm_layers
from ttt_adapt.model.probe import evaluating, probe_images, probe_sizes
from ttt_adapt.model.trace import Trace

KINDS = ("batchnorm", "norms", "blocks")
"""Kinds of points, in the order in which a default is chosen."""


@dataclass(frozen=True)
class Point:
    """A place in a model.

    Attributes:
        name: dotted path of the module.
        module: whose input (of a layer with running statistics) or output (of every other) is meant.
        layout: "nchw", "nhwc" or "tokens" ([B, prefix + h * w, C]).
        channels: C.
        prefix: leading tokens that are no patches (class, registers): they are neither measured nor corrected.
    """

    name: str
    module: nn.Module
    layout: Literal["nchw", "nhwc", "tokens"]
    channels: int
    prefix: int = 0

    @property
    def keeps_statistics(self) -> bool:
        """Whether the module has running statistics, so that its input is meant."""
        return isinstance(self.module, _NormBase)

    def patches(self, x: Tensor) -> Tensor:
        """A view of `x` without its prefix tokens."""
        return x[:, self.prefix :] if self.prefix else x

    def along_channels(self, values: Tensor) -> Tensor:
        """Values [C] in a shape that multiplies the module's tensor."""
        return values.view(-1, 1, 1) if self.layout == "nchw" else values

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every channel of `x`, over the batch and over space: [C] each."""
        return channel_moments(self.patches(x), 1 if self.layout == "nchw" else -1)


def find_points(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> dict[str, list[Point]]:
    """The points of a model by kind, found by running it on random images; a kind without points is left out.

    Points that are reached more often in a pass than most layers are left out too: a shared layer has no statistics of
    its own.

    Args:
        model: any module that takes images [B, 3, H, W].
        image_size: (H, W) or side of the random images; by default several sizes are tried.

    Raises:
        EncoderError: the model takes none of the sizes, or it has no point at all.
    """
    failures = []
    for size in probe_sizes(model, image_size):
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), uncompiled():
            images = probe_images(model, size)
            try:
                found = points_of_pass(model, images, lambda: model(images))  # noqa: B023 - called at once
            except Exception as error:  # the model does not take this size: try the next one
                failures.append(f"{size[0]} x {size[1]}: {type(error).__name__}: {error}")
                continue
        if not found:
            raise EncoderError(
                f"{type(model).__name__} has no normalisation layer and no repeated block whose output has a grid: "
                "there is no point where the statistics of a frame could be compared with those of the source"
            )
        return found
    raise EncoderError(
        "the model could not be run on random images to find its normalisation layers and blocks; tried "
        + "; ".join(failures)
        + ". Pass image_size=(H, W) with a size that it takes"
    )


def points_of_pass(model: nn.Module, images: Tensor, run: Any) -> dict[str, list[Point]]:
    """As `find_points`, for one pass.

    Args:
        model: the user's model.
        images: [B, 3, H, W], what it runs on.
        run: runs the model on them; its result is not used.
    """
    names = {module: name for name, module in model.named_modules()}
    running = set(norm_layers(model))
    norms = {m for m in names if is_norm(m) and m not in running}
    with Trace(model, images) as trace, _Seen(names) as seen:
        run()
    usual = seen.usual_calls()
    strides = _strides(trace)
    sizes = [shape[-2:] for shape in (seen.shapes[trace.stem][0] if trace.stem else None, tuple(images.shape)) if shape]
    found: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    for module in {m: None for m in names if m in {*running, *norms, *repeated_blocks(model)}}:
        if seen.calls.get(module) != usual:
            continue
        before, after = seen.shapes[module]
        kind = "batchnorm" if module in running else "norms" if module in norms else "blocks"
        shape = before if kind == "batchnorm" else after
        if shape is None or (kind == "blocks" and before != after):
            continue
        point = next((p for size in sizes if (p := _point(names[module], module, shape, size, strides))), None)
        if point is not None and (kind != "batchnorm" or point.layout == "nchw"):
            found[kind].append(point)
    return {kind: points for kind, points in found.items() if points}


class _Seen:
    """Records how often modules are called, and the shapes of the first call's first tensor, in and out."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = modules
        self.calls: dict[nn.Module, int] = {}
        self.shapes: dict[nn.Module, tuple[tuple[int, ...] | None, tuple[int, ...] | None]] = {}

    def __enter__(self) -> _Seen:
        self._hooks = hooks(m.register_forward_hook(self._see, with_kwargs=True) for m in self._modules)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(None, None, None)

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = next(tensors([args, kwargs]), None), first_tensor(output)
        self.calls[module] = self.calls.get(module, 0) + 1
        shapes = tuple(None if x is None else tuple(x.shape) for x in (before, after))
        self.shapes.setdefault(module, shapes)  # type: ignore[arg-type]

    def usual_calls(self) -> int:
        """How often most layers are called: once, or several times where a frame is predicted in several passes."""
        layers = Counter(count for module, count in self.calls.items() if not any(module.children()))
        return min(layers, key=lambda count: (-layers[count], count), default=1)


def first_tensor(output: Any) -> Tensor | None:
    """What a module returned, or the first of the tuple that it returned; None where that is no tensor."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


def _strides(trace: Trace) -> list[int]:
    """Sides in pixels that a token may have: that of the first convolution, and its multiples by powers of two."""
    stem = trace.stem
    first = 4 if stem is None else int(stem.stride[0])
    return [first * 2**i for i in range(6)]


def _point(name: str, module: nn.Module, shape: tuple[int, ...], size: Any, strides: list[int]) -> Point | None:
    """The point with a tensor of this shape; None where it has no grid."""
    spec = None
    if len(shape) == 4:
        spec = describe_map(shape, size, None)
    elif len(shape) == 3:
        grids = [stride for stride in strides if (size[0] // stride) * (size[1] // stride) > 1]
        specs = [each for stride in grids if (each := describe_map(shape, size, stride)) is not None]
        # registers stand before the tokens of plain transformers; elsewhere more tokens than a grid has are queries
        fitting = [each for each in specs if each.prefix <= 1 or each.stride == strides[0]]
        spec = min(fitting, key=lambda each: each.prefix, default=None)
    if spec is None:
        return None
    return Point(name, module, spec.layout, spec.channels, spec.prefix)
