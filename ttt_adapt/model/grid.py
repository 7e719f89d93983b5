"""Find the feature maps in what an encoder returns, by trial.

- Two images of different shapes tell which axes of a tensor are a grid, and how many pixels a cell covers.
- Tokens come in a row, so their number alone does not tell which of them are patches, and in which order. Small squares
  of the image are changed one after the other; the tokens that answer show where each lies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import FeatureMapError
from ttt_adapt.model.features import MAX_PREFIX, TOKEN_AXES, Layout, MapSpec, grid_of, tensors, to_maps

Size = tuple[int, int]
Shape = tuple[int, ...]

MAX_EXTRA = 512
"""More tokens beside the patches than this are not looked for (class, registers, detection tokens of YOLOS)."""

BORDER, WIDEST = (-1.5, 3.5), (-64.0, 64.0)
"""Cells by which a map may be smaller than the image, as without padding; and the same where it is refused for that."""

SQUARES = 4
"""How many squares of an image are changed, one after the other, to see where tokens lie."""

FLAT = 1.2
"""Where no token answers this many times as far as the mean of all tokens, the answers do not tell where tokens lie."""

LEAST_SCORE = 0.25
"""Share of the largest answers below which the answers of the expected cells contradict a layout."""


@dataclass(frozen=True)
class Seen:
    """Shapes of the tensors that an encoder returned for an image of `size` (H, W)."""

    size: Size
    shapes: list[Shape]


def find_maps(run: Callable[[Tensor], Any], images: Tensor, others: Iterable[Size]) -> list[MapSpec]:
    """Find the feature maps in an encoder's output: finest first; of one stride in the order of the output.

    Args:
        run: images [1, C, H, W] -> what the encoder returns.
        images: random images [1, C, H, W] that the model takes.
        others: further sizes (H, W), to be tried in this order until the model takes one.

    Raises:
        FeatureMapError: nothing in the output has the layout of a feature map, or its tokens lie in no known order.
    """
    output = list(tensors(run(images)))
    seen = [Seen(_size(images), [tuple(x.shape) for x in output]), *_second(run, images, others, len(output))]
    found: list[MapSpec] = []
    for index, plain in enumerate(output):
        if not plain.is_floating_point():  # a mask beside the features
            continue
        pairs = [(each.size, each.shapes[index]) for each in seen]
        fixed = len(pairs) > 1 and pairs[0][1] == pairs[1][1]  # the same grid over images of any size, or no grid
        specs = layouts(pairs[:1] if fixed else pairs, index)
        if not specs or (specs[0].layout in ("nchw", "nhwc") and not fixed):
            spec = specs[0] if specs else None
        else:
            spec = Squares(run, images, plain, specs[0]).place(specs, certain=fixed)
        if spec is not None:
            found.append(spec)
    if not found:
        raise FeatureMapError(_no_map(seen))
    return sorted(found, key=lambda spec: spec.stride)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]


def tiled(images: Tensor, size: Size) -> Tensor:
    """Images [B, C, H, W] beside and below each other, cut to `size` (H, W)."""
    repeats = (1, 1, -(-size[0] // images.shape[2]), -(-size[1] // images.shape[3]))
    return images.repeat(repeats)[..., : size[0], : size[1]]


def _second(run: Callable[[Tensor], Any], images: Tensor, others: Iterable[Size], count: int) -> Iterator[Seen]:
    """What the encoder returns for the first of the other sizes that the model takes; nothing where it takes none."""
    for size in others:
        try:
            shapes = [tuple(x.shape) for x in tensors(run(tiled(images, size)))]
        except Exception:  # the model does not take this size
            continue
        if len(shapes) == count:
            yield Seen(size, shapes)
            return


def _no_map(seen: list[Seen]) -> str:
    """Why nothing in the output is a feature map, and what to do."""
    size, shapes = seen[0].size, seen[0].shapes
    if border := _border(seen):
        stride, cells = border
        more, acts = ("more", "pads") if cells > 0 else ("fewer", "crops")
        return (
            f"the encoder returned {shapes} for images of {size[0]} x {size[1]}: a map with cells of {stride} pixels "
            f"that has {abs(cells)} cells {more} than the image along each axis, so the model {acts} its images inside "
            f"by more than can be placed; expected a map over the image itself: let the model take images as it {acts} "
            "them"
        )
    same = len(seen) > 1 and shapes == seen[1].shapes and any(len(shape) > 2 for shape in shapes)
    why = f", and the same for {seen[1].size[0]} x {seen[1].size[1]}: they are no grid over the image" if same else ""
    return (
        f"the encoder returned {shapes or 'no tensor'} for images of {size[0]} x {size[1]}{why}; "
        "expected feature maps [B, C, h, w] or [B, h, w, C], or tokens [B, N, C]: "
        "name an earlier module, before the features are pooled"
    )


def _border(seen: list[Seen]) -> tuple[int, int] | None:
    """Pixels of a cell, and by how many cells a map is larger than the image; None without a map of that kind."""
    for shapes in zip(*(each.shapes for each in seen), strict=True):
        for rows in (2, 1):
            if len(seen) < 2 or any(len(shape) != 4 or shape[0] != 1 for shape in shapes):
                continue
            sizes = [(each.size, shape[rows : rows + 2]) for each, shape in zip(seen, shapes, strict=True)]
            sides = [pair for size, grid in sizes for pair in zip(size, grid, strict=True)]
            cells = [count for _, count in sides]
            stride = _fitting_stride(sides, WIDEST) if max(cells) - min(cells) > 1 else None
            if stride is not None:
                return stride, round(sum(count - side / stride for side, count in sides) / len(sides))
    return None


def layouts(seen: list[tuple[Size, Shape]], index: int = 0) -> list[MapSpec]:
    """The layouts that a tensor may have, the most plausible first; none if it is no feature map.

    Args:
        seen: size (H, W) of one image -> shape of the tensor, for one or two sizes.
        index: which of the encoder's output tensors it is.
    """
    shapes = [shape for _, shape in seen]
    if len({len(shape) for shape in shapes}) != 1:
        return []
    if len(shapes[0]) == 4:
        return [spec for spec in (_map(seen, index, "nchw", 2, 1), _map(seen, index, "nhwc", 1, 3)) if spec][:1]
    if len(shapes[0]) == 3:
        return _tokens(seen, index)
    return []


def _map(seen: list[tuple[Size, Shape]], index: int, layout: Layout, rows: int, channels: int) -> MapSpec | None:
    """A map with its rows and columns in the axes `rows` and `rows + 1`; None if these are no grid over the image."""
    if any(shape[0] != 1 for _, shape in seen) or len({shape[channels] for _, shape in seen}) != 1:
        return None
    sides = [(side, cells) for size, shape in seen for side, cells in zip(size, shape[rows : rows + 2], strict=True)]
    if all(cells == 1 for _, cells in sides):  # a pooled vector
        return None
    stride = _fitting_stride(sides)
    return MapSpec(index, layout, seen[0][1][channels], stride) if stride else None


def _fitting_stride(sides: list[tuple[int, int]], border: tuple[float, float] = BORDER) -> int | None:
    """The pixels of a cell, from pairs of an image side and a number of cells; None if they do not belong together.

    The number of cells is side / stride less a border, the same for all sides up to rounding. Of strides that fit
    about equally well, a power of two is taken.
    """
    costs: dict[int, float] = {}
    for stride in range(1, max(side for side, _ in sides) + 1):
        missing = [side / stride - cells for side, cells in sides]
        mean = sum(missing) / len(missing)
        spread = max(missing) - min(missing)
        whole = all(cells in (side // stride, -(-side // stride)) for side, cells in sides)
        if whole or (len(sides) > 2 and spread <= 1 and border[0] < mean < border[1]):
            costs[stride] = sum((m - mean) ** 2 for m in missing) / len(missing) + 0.01 * mean**2
    if not costs:
        return None
    best = min(costs.values())
    near = [stride for stride, cost in costs.items() if cost <= best + 0.02]
    return next((s for s in near if s & (s - 1) == 0), min(costs, key=lambda s: costs[s]))


def _tokens(seen: list[tuple[Size, Shape]], index: int) -> list[MapSpec]:
    """The layouts that tokens may have, without those beside the patches or with all of them in front."""
    for layout, (batch, rows, channels) in TOKEN_AXES.items():
        shapes = [shape for _, shape in seen]
        widths = {shape[channels] for shape in shapes}
        if any(shape[batch] != 1 for shape in shapes) or len(widths) != 1 or widths == {1}:
            continue
        counts = [(size, shape[rows]) for size, shape in seen]
        if len(seen) > 1 and len({count for _, count in counts}) == 1:
            continue
        specs = [MapSpec(index, layout, shapes[0][channels], stride, extra) for stride, extra in _strides(counts)]  # type: ignore[arg-type]
        if specs:
            return specs
    return []


def _strides(counts: list[tuple[Size, int]]) -> list[tuple[int, int]]:
    """Pixels of a token, and how many tokens are no patches: all pairs that fit, the most plausible first.

    Whole tokens go before those that the image fills in part, and few tokens beside the patches before many.

    Args:
        counts: size (H, W) of an image and the number of its tokens, for one or two sizes.
    """
    most = MAX_EXTRA if len(counts) > 1 else MAX_PREFIX  # one size alone fits many strides
    found: dict[tuple[Any, int], tuple[int, int, int]] = {}
    for stride in range(1, min(min(size) for size, _ in counts)):
        for rounding in (0, 1):
            grids = [grid_of(size, stride)[rounding] for size, _ in counts]
            extras = {count - h * w for (_, count), (h, w) in zip(counts, grids, strict=True)}
            if len(extras) == 1 and 0 <= (extra := extras.pop()) <= most and all(h * w > 1 for h, w in grids):
                parts = sum(side % stride != 0 for size, _ in counts for side in size)
                key = (tuple(grids), extra)
                found[key] = min(found.get(key, (parts, extra, -stride)), (parts, extra, -stride))
    return [(-stride, extra) for _, extra, stride in sorted(found.values())]


class Squares:
    """Small squares of an image, changed one after the other, and how far each token answers to that.

    Args:
        run: images -> what the encoder returns.
        images: [1, C, H, W].
        plain: the tokens, or the map, for these images.
        spec: one of the layouts that its shape allows; the squares have the size of its cells.
    """

    def __init__(self, run: Callable[[Tensor], Any], images: Tensor, plain: Tensor, spec: MapSpec) -> None:
        self.size, self.shape, self.layout = _size(images), tuple(plain.shape), spec.layout
        self.squares = list(_squares(self.size, spec.stride))
        rows = [list(tensors(run(_changed(images, square))))[spec.index] - plain for square in self.squares]
        answers = torch.stack([self._tokens(row)[0].float().norm(dim=-1) for row in rows])  # [squares, tokens]
        answers = answers / answers.mean(0).clamp_min(1e-30)  # some tokens answer to everything, such as a class token
        self.flat = bool((answers.amax(1) <= FLAT * answers.mean(1)).all())
        deviations = answers - answers.mean(1, keepdim=True)
        self.answers = deviations / answers.std(1, keepdim=True).clamp_min(1e-30)

    def _tokens(self, tensor: Tensor) -> Tensor:
        """A tensor in the layout of this output -> tokens [B, N, C]."""
        if self.layout == "nchw":
            return tensor.flatten(2).transpose(1, 2)
        return tensor.flatten(1, 2) if self.layout == "nhwc" else tensor.permute(TOKEN_AXES[self.layout])

    def place(self, specs: list[MapSpec], certain: bool) -> MapSpec | None:
        """Of the layouts `specs`, the one by which tokens lie where the pixels are that they answer to.

        The first is taken if another is hardly better, or if all tokens answer alike.

        Args:
            specs: the layouts that the shapes allow, the most plausible first.
            certain: take no layout unless the answers say so.

        Raises:
            FeatureMapError: tokens answer to pixels in an order that is none of the known ones.
        """
        known = [each for spec in specs for each in _orders(spec)]
        scores = [self._score(each) for each in known]
        best = max(range(len(known)), key=lambda i: scores[i])
        if self.flat or scores[best] < LEAST_SCORE * self.answers.amax(1).mean():
            if certain:
                return None
            if not self.flat:
                raise FeatureMapError(
                    f"the encoder returned {self.shape} for images of {self.size[0]} x {self.size[1]}; these tokens "
                    "lie neither row by row nor column by column in the image (were they sorted into windows?): name "
                    "a module whose tokens do, such as a later stage"
                )
        return known[0] if self.flat or scores[0] >= 0.9 * scores[best] else known[best]

    def _score(self, spec: MapSpec) -> float:
        """How far the cells answer that a layout expects in each square, in standard deviations over the tokens."""
        answers = self.answers[..., None]  # [squares, tokens, 1]
        if spec.layout in ("nchw", "nhwc"):
            rows = self.shape[2:] if spec.layout == "nchw" else self.shape[1:3]
            maps = answers[..., 0].unflatten(1, rows)  # [squares, h, w]
        else:
            maps = to_maps(answers, [replace(spec, index=0, layout="tokens", channels=1)], self.size)[0][:, 0]
        s = spec.stride
        return sum(
            cells[top // s : -(-(top + side) // s), left // s : -(-(left + side) // s)].mean().item()
            for cells, (top, left, side) in zip(maps, self.squares, strict=True)
        ) / len(self.squares)


def _squares(size: Size, side: int) -> Iterator[tuple[int, int, int]]:
    """Squares of an image (H, W), as top, left and side: cells of a grid, spread over the image."""
    cells = list(itertools.product(range(max(size[0] // side, 1)), range(max(size[1] // side, 1))))
    generator = torch.Generator().manual_seed(0)
    for i in torch.randperm(len(cells), generator=generator)[:SQUARES].tolist():
        yield cells[i][0] * side, cells[i][1] * side, side


def _changed(images: Tensor, square: tuple[int, int, int]) -> Tensor:
    """The images with other pixels in a square."""
    top, left, side = square
    changed = images.clone()
    inside = images[..., top : top + side, left : left + side]
    changed[..., top : top + side, left : left + side] = -2 * inside.flip(-1)
    return changed


def _orders(spec: MapSpec) -> Iterator[MapSpec]:
    """A layout with all tokens beside the patches in front, and the same with them elsewhere, and column by column."""
    extra = spec.prefix
    for by_columns in (False, True) if spec.layout in TOKEN_AXES else (False,):
        yield replace(spec, by_columns=by_columns)
        if extra:
            yield replace(spec, prefix=0, middle=extra, by_columns=by_columns)
        for prefix in range(extra):
            yield replace(spec, prefix=prefix, suffix=extra - prefix, by_columns=by_columns)
