"""Correct the statistics of a pass by a calibration: hooks on the points of a model, for one `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, StateError
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.corrected import CORRECTED, Corrected, own_tensors
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.points import SIDES, Point
from ttt_adapt.model.rule import PointStatistics, Rule
from ttt_adapt.model.threads import ANOTHER_THREAD, in_this_thread


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
    """What corrects the passes of a model by a calibration of its weights.

    Raises:
        ConfigError: the calibration has points that the model has not.
    """
    modules = dict(model.named_modules())
    for (kind, name), each in calibration.points.items():
        _check_point(modules.get(name), kind, name, len(each.mean))
    points = [
        Point(name, modules[name], SIDES[kind], each.layout, len(each.mean), each.prefix)
        for (kind, name), each in calibration.points.items()
    ]
    statistics = {name: each for (_, name), each in calibration.points.items()}
    device = next((x.device for x in own_tensors(model)), None)
    return Correction(points, statistics, calibration.rule, calibration.usual_drift, device)


def _check_point(module: nn.Module | None, kind: str, name: str, channels: int) -> None:
    """Refuse a point that a calibration has, and the model has not.

    Raises:
        ConfigError: there is no such module, or it has another number of channels.
    """
    own: Any = channels
    if kind == "batchnorm":
        own = len(getattr(module, "running_mean", ()))
    elif kind == "input":
        own = getattr(module, "in_channels", None)
    if module is None or own != channels:
        raise ConfigError(
            f"the calibration has {channels} channels at {name!r} ({kind}), where this model has "
            f"{'no module' if module is None else own}: calibrate the model again"
        )


class Correction:
    """Calibrated statistics, ready to run.

    Args:
        points: where passes are corrected.
        statistics: of the source, by the name of a point.
        rule: how.
        unit: the drift that is usual.
        device: of the model, for points that have no tensor of their own.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        points: Iterable[Point],
        statistics: Mapping[str, PointStatistics],
        rule: Rule,
        unit: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        chosen = [point for point in points if point.name in statistics]
        device = next((x.device for point in chosen for x in own_tensors(point.module)), device)
        self._unit = max(unit, 1e-12)
        # in fixed places, where also a recorded pass leaves its numbers
        self._numbers = torch.zeros(len(chosen) + 1, device=device)
        self._seen, self._calls = self._numbers[:-1], self._numbers[-1]
        self._last = torch.zeros_like(self._numbers)  # the numbers of the last frame that was predicted to its end
        self._layers = [
            CORRECTED[point.side](point, statistics[point.name], rule, seen, device)
            for point, seen in zip(chosen, self._seen, strict=True)
        ]
        self._passed = False

    def drift(self) -> Tensor | None:
        """How far the frame of the last pass is from the source: scalar, None before the first block of `active`.

        It is the mean over the points of a layer's divergence, each in units of what is usual at that layer, over
        `unit`. Of a frame that is predicted in several passes, it is their mean. It is NaN where no block had a pass.
        """
        if not (self._passed and self._layers):
            return None
        return (self._last[:-1] / self._last[-1]).mean() / self._unit

    def forget(self) -> None:
        """A new video begins: there was no pass yet."""
        self._passed = False
        self._last.zero_()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, passes are corrected, each by its own statistics: nothing is carried from pass to pass.

        Until its end the drift is that of the block before, and also after it where it raises or has no pass.

        Raises:
            StateError: at the end of the block, where the model ran in another thread alone and nothing was corrected.
        """
        elsewhere: list[None] = []
        self._numbers.zero_()
        norms = [layer.point.module for layer in self._layers if layer.point.side == "statistics"]
        before = [(norm, norm.training, norm._buffers.copy()) for norm in norms]
        with hooks(self._hook(layer, i == 0, elsewhere) for i, layer in enumerate(self._layers)):
            try:
                for norm in norms:
                    if norm.training:
                        norm.training = False
                yield
                if elsewhere and not bool(self._calls):  # the host waits for this number only where there is a doubt
                    raise StateError(ANOTHER_THREAD)
            finally:
                for norm, training, buffers in before:
                    norm._buffers.update(buffers)
                    if training:
                        norm.training = True
        torch.where(self._calls > 0, self._numbers, self._last, out=self._last)
        self._passed = True

    def _hook(self, layer: Corrected, first: bool, elsewhere: list[None]) -> RemovableHandle:
        """Set the hook of a layer; that of the first one counts the passes, in `elsewhere` those of other threads."""

        def here(hook: Callable[..., Any]) -> Callable[..., Any]:
            return in_this_thread(hook, (lambda: elsewhere.append(None)) if first else None)

        return layer.register(here, self._calls if first else None)
