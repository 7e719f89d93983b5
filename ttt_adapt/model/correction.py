"""Correct the statistics of a pass by a calibration: hooks on the points of a model, for one `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.model.calibration import Calibration, PointStatistics, Rule
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.norms import blended_statistics
from ttt_adapt.model.points import Point


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
    places = calibration.points.items()
    points = [Point(name, modules[name], each.layout, len(each.mean), each.prefix) for name, each in places]
    return Correction(points, calibration.points, calibration.rule)


class Correction:
    """Calibrated statistics, ready to run.

    Args:
        points: where passes are corrected.
        statistics: of the source, by the name of a point.
        rule: how.
    """

    def __init__(self, points: Iterable[Point], statistics: Mapping[str, PointStatistics], rule: Rule) -> None:
        chosen = [point for point in points if point.name in statistics]
        self._largest = rule.largest
        self._points = chosen
        self._layers = {
            point.name: _Layer(statistics[point.name], rule, next(_own_tensors(point.module), None)) for point in chosen
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
        outputs = [point for point in self._points if not point.keeps_statistics]
        layers = {point.module: self._layers[point.name] for point in self._points if point.keeps_statistics}

        def share(norm: nn.Module, mean: Tensor, variance: Tensor) -> Tensor:
            return self._share(layers[norm], mean, variance)

        with (
            hooks(point.module.register_forward_hook(self._correct_output(point)) for point in outputs),
            blended_statistics(layers, share),
        ):
            yield

    def _correct_output(self, point: Point) -> Any:
        layer = self._layers[point.name]

        def correct(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            x = output.detach()
            mean, variance = point.moments(x)
            share = self._share(layer, mean, variance)
            deviation = layer.std.lerp(variance.sqrt(), share)
            factor = layer.std / deviation.clamp_min(layer.floor)
            shift = layer.mean - layer.mean.lerp(mean, share) * factor
            factor, shift = (point.along_channels(v).to(x.dtype) for v in (factor, shift))
            if not point.prefix:
                return torch.addcmul(shift, output, factor)
            patches = torch.addcmul(shift, point.patches(output), factor)
            return torch.cat([output[:, : point.prefix], patches], 1)

        return correct

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
