"""Correct the statistics of a pass by a calibration: hooks on the points of a model, for one `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.model.calibration import Calibration, PointStatistics, Rule
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.norms import blended_statistics
from ttt_adapt.model.points import SIDES, Point


def correction_of(model: nn.Module, config: StreamConfig, calibration: Calibration | None) -> Correction | None:
    """What corrects the passes of a stream; None where its `norm_stats` is not "calibrated".

    Raises:
        ConfigError: the calibration is of other weights.
    """
    if config.norm_stats != "calibrated" or calibration is None:
        return None
    calibration.check(model)
    return correction(model, calibration)


def correction(model: nn.Module, calibration: Calibration) -> Correction:
    """What corrects the passes of a model by a calibration of its weights."""
    modules = dict(model.named_modules())
    return Correction(
        {
            Point(name, modules[name], SIDES[kind], each.layout, len(each.mean), each.prefix): each
            for (kind, name), each in calibration.points.items()
        },
        calibration.rule,
    )


class Correction:
    """Calibrated statistics, ready to run.

    Args:
        points: where passes are corrected -> what the source is like there.
        rule: how.
    """

    def __init__(self, points: Mapping[Point, PointStatistics], rule: Rule) -> None:
        self._largest = rule.largest
        self._layers = {
            point: _Layer(statistics, rule, next(_own_tensors(point.module), None))
            for point, statistics in points.items()
        }
        self._seen: dict[_Layer, Tensor] = {}

    def drift(self) -> Tensor | None:
        """How far the frame of the last pass is from the source: scalar, None before the first pass.

        It is the mean over the points of a layer's divergence, in units of what is usual; 1 is the mean over the
        source stills.
        """
        return torch.stack(list(self._seen.values())).mean() if self._seen else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, passes are corrected, each by its own statistics: nothing is carried from pass to pass."""
        layers = {point.module: layer for point, layer in self._layers.items() if point.side == "statistics"}

        def share(norm: nn.Module, mean: Tensor, variance: Tensor) -> Tensor:
            return self._share(layers[norm], mean, variance)

        handles = (
            point.module.register_forward_hook(self._after(point))
            if point.side == "output"
            else point.module.register_forward_pre_hook(self._before(point))
            for point in self._layers
            if point.side != "statistics"
        )
        with hooks(handles), blended_statistics(layers, share):
            yield

    def _after(self, point: Point) -> Any:
        def correct(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return self._corrected(point, output)
            return type(output)([self._corrected(point, output[0]), *output[1:]])

        return correct

    def _before(self, point: Point) -> Any:
        return lambda _module, args: (self._corrected(point, args[0]), *args[1:])

    def _corrected(self, point: Point, x: Tensor) -> Tensor:
        """`x` with the mean and deviation of the source, as far as its share of its own goes."""
        layer = self._layers[point]
        mean, variance = point.moments(x.detach())
        share = self._share(layer, mean, variance)
        deviation = layer.std.lerp(variance.sqrt(), share)
        factor = layer.std / deviation.clamp_min(layer.floor)
        shift = layer.mean - layer.mean.lerp(mean, share) * factor
        factor, shift = (point.along_channels(v).to(x.dtype) for v in (factor, shift))
        if not point.prefix:
            return torch.addcmul(shift, x, factor)
        return torch.cat([x[:, : point.prefix], torch.addcmul(shift, point.patches(x), factor)], 1)

    def _share(self, layer: _Layer, mean: Tensor, variance: Tensor) -> Tensor:
        """Share of the frame's own statistics: [C], or a scalar for a layer; 0 where they are not finite."""
        d = ((mean - layer.mean) * layer.inverse).square() + (variance.sqrt() * layer.inverse - 1.0).square()
        whole = d.mean()
        self._seen[layer] = whole * layer.unit
        d = d if layer.per_channel else whole
        return torch.nan_to_num(1.0 - layer.threshold / d, nan=0.0, posinf=0.0, neginf=0.0).clamp(0.0, self._largest)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module, to see on which device it is."""
    yield from module.parameters()
    yield from module.buffers()


class _Layer:
    """The numbers of one point, as a pass needs them, on the device of its layer."""

    def __init__(self, statistics: PointStatistics, rule: Rule, like: Tensor | None) -> None:
        device = statistics.mean.device if like is None else like.device
        self.mean, self.std = statistics.mean.to(device), statistics.std.to(device)
        largest = self.std.max()
        self.floor = largest * 1e-4 + torch.finfo(self.std.dtype).tiny
        self.inverse = 1.0 / self.std.clamp_min(self.floor)
        self.threshold = statistics.threshold(rule).to(device)
        self.unit = 1.0 / statistics.layer_usual.clamp_min(1e-12).to(device)
        self.per_channel = rule.per == "channel"
