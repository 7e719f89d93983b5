"""Points of a model where the statistics of a frame can be measured and corrected.

There are four kinds. Each point has C channels, and a frame has one mean and one deviation per channel there, over
space; the image has levels (`ttt_adapt.model.tone`) in place of the mean.

| kind | where |
|---|---|
| "batchnorm" | the input of every layer with running statistics: the frame's own may replace a part of them |
| "norms" | the output of every other normalisation layer (LayerNorm, RMSNorm, GroupNorm, ...) |
| "blocks" | the output of the model's repeated blocks (of a ViT, Swin, ConvNeXt, ResNet) |
| "input" | the input of the first convolution: the image, as the model takes it; not where it goes over windows |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ttt_adapt.model.blocks import repeated_blocks
from ttt_adapt.model.features import Layout, MapSpec, describe_map, tensors
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.norms import channel_moments, is_norm, norm_layers
from ttt_adapt.model.tone import levels_of
from ttt_adapt.model.trace import Trace

KINDS = ("batchnorm", "norms", "blocks", "input")
"""Kinds of points, in the order in which a default is chosen."""

SIDES: dict[str, Any] = {"batchnorm": "statistics", "norms": "output", "blocks": "output", "input": "input"}
"""Kind of a point -> what is corrected there."""


@dataclass(frozen=True)
class Point:
    """A place in a model.

    Attributes:
        name: dotted path of the module.
        module: the module.
        side: what is corrected: its running "statistics", its "input" or its "output".
        layout: "nchw", "nhwc" or "tokens" ([B, prefix + h * w, C]).
        channels: C.
        prefix: leading tokens that are no patches (class, registers): they are neither measured nor corrected.
    """

    name: str
    module: nn.Module
    side: Literal["statistics", "input", "output"]
    layout: Layout
    channels: int
    prefix: int = 0

    def patches(self, x: Tensor) -> Tensor:
        """A view of `x` without its prefix tokens."""
        return x[:, self.prefix :] if self.prefix else x

    def along_channels(self, values: Tensor) -> Tensor:
        """Values [C] in a shape that multiplies the module's tensor."""
        return values.view(-1, 1, 1) if self.layout == "nchw" else values

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every channel of `x`, over the batch and over space: [C] each.

        In place of the mean, an image has its levels: [C, LEVELS].
        """
        mean, variance = channel_moments(self.patches(x), 1 if self.layout == "nchw" else -1)
        return (levels_of(x) if self.side == "input" else mean), variance


def points_of_pass(model: nn.Module, images: Tensor, run: Any) -> dict[str, list[Point]]:
    """The points of a model by kind, in the order of `KINDS`; a kind without points is left out.

    Points that are reached more often in a pass than the first convolution, or less often, are left out too: a shared
    layer has no statistics of its own. Where the first convolution is called several times in a pass, as for windows
    of one image, there is no "input" point: each window has its own tones, which are not those of the whole image.

    Args:
        model: the user's model.
        images: [B, 3, H, W], what it runs on.
        run: runs the model on them; its result is not used.
    """
    names = {module: name for name, module in model.named_modules()}
    running = set(norm_layers(model))
    norms = {m for m in names if is_norm(m) and m not in running}
    with Trace(model, images) as trace, _Seen({*running, *norms, *repeated_blocks(model)}) as seen:
        run()
    strides = _strides(trace)
    inputs = trace.stem_inputs or [tuple(images.shape)]
    size = (inputs[0][-2], inputs[0][-1])  # of a window, where the model goes over the image in windows
    prefix = _prefix(seen, size, strides)
    found: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    for module in names:
        if seen.calls.get(module) != len(inputs):
            continue
        before, after = seen.shapes[module]
        kind = "batchnorm" if module in running else "norms" if module in norms else "blocks"
        shape = before if kind == "batchnorm" else after
        if shape is None or (kind == "blocks" and before != after):
            continue
        point = _point(names[module], module, SIDES[kind], shape, size, strides)
        if point is None or (kind == "batchnorm" and point.layout != "nchw"):
            continue
        if point.layout != "tokens" or point.prefix == prefix:
            found[kind].append(point)
    if trace.stem is not None and len(inputs) == 1:
        found["input"].append(Point(trace.stem_path, trace.stem, "input", "nchw", trace.stem.in_channels))
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


def first_tensor(output: Any) -> Tensor | None:
    """What a module returned, or the first of the tuple that it returned; None where that is no tensor."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


def _strides(trace: Trace) -> list[int]:
    """Sides in pixels that a token may have: that of the first convolution, and its multiples by powers of two."""
    stem = trace.stem
    first = 4 if stem is None else int(stem.stride[0])
    return [first * 2**i for i in range(6)]


def _prefix(seen: _Seen, size: tuple[int, int], strides: list[int]) -> int | None:
    """How many leading tokens of this model are no patches: those of the first tokens of the pass; None without a grid.

    Tokens with another number of them are no patches at all, such as the queries of a decoder.
    """
    shapes = (shape for pair in seen.shapes.values() for shape in pair[1:])
    first = next((shape for shape in shapes if shape is not None and len(shape) == 3), None)
    spec = None if first is None else _tokens(first, size, strides, padded=strides[:1])
    return None if spec is None else spec.prefix


def _tokens(
    shape: tuple[int, ...], size: tuple[int, int], strides: list[int], padded: list[int] | None = None
) -> MapSpec | None:
    """The layout of tokens of this shape, with as few leading tokens that are no patches as can be; None: no grid.

    Several such tokens stand before those of a plain transformer, which have the size of the first convolution's.
    Elsewhere, more tokens than a grid has are queries.

    Args:
        shape: [B, tokens, C].
        size: (H, W) of the images.
        strides: sides that a token may have.
        padded: those for which images may be padded to whole tokens; by default all.
    """
    whole = [-(-size[0] // stride) * -(-size[1] // stride) for stride in (strides if padded is None else padded)]
    if shape[1] > 1 and shape[1] in whole:
        return MapSpec(0, "tokens", shape[2], 1)
    grids = [stride for stride in strides if (size[0] // stride) * (size[1] // stride) > 1]
    specs = [each for stride in grids if (each := describe_map(shape, size, stride)) is not None]
    fitting = [each for each in specs if each.prefix <= 1 or each.stride == strides[0]]
    return min(fitting, key=lambda each: each.prefix, default=None)


def _point(
    name: str, module: nn.Module, side: Any, shape: tuple[int, ...], size: tuple[int, int], strides: list[int]
) -> Point | None:
    """The point with a tensor of this shape; None where it has no grid."""
    spec = None
    if len(shape) == 4:
        spec = describe_map(shape, size, None)
    elif len(shape) == 3:
        spec = _tokens(shape, size, strides)
    if spec is None:
        return None
    return Point(name, module, side, spec.layout, spec.channels, spec.prefix)
