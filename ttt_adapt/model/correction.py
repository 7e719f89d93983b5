"""Correct the statistics of a pass by a calibration: hooks on the points of a model, for one `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, StateError
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.norms import channel_moments
from ttt_adapt.model.points import SIDES, Point, first_tensor
from ttt_adapt.model.rule import PointStatistics, Rule, above_zero
from ttt_adapt.model.threads import ANOTHER_THREAD, in_this_thread
from ttt_adapt.model.tone import along_curve, levels_of, tone_divergence


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
    device = next((x.device for x in _own_tensors(model)), None)
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
        device = next((x.device for point in chosen for x in _own_tensors(point.module)), device)
        self._unit = max(unit, 1e-12)
        # in fixed places, where also a recorded pass leaves its numbers
        self._numbers = torch.zeros(len(chosen) + 1, device=device)
        self._seen, self._calls = self._numbers[:-1], self._numbers[-1]
        self._last = torch.zeros_like(self._numbers)  # the numbers of the last frame that was predicted to its end
        self._layers = [
            (_Image if point.side == "input" else _Layer)(point, statistics[point.name], rule, seen, device)
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

    def _hook(self, layer: _Layer | _Image, first: bool, elsewhere: list[None]) -> Any:
        """Set the hook of a layer; that of the first one counts the passes, in `elsewhere` those of other threads."""
        module, calls = layer.point.module, self._calls if first else None

        def here(hook: Callable[..., Any]) -> Callable[..., Any]:
            return in_this_thread(hook, (lambda: elsewhere.append(None)) if first else None)

        if isinstance(layer, _Image):
            return module.register_forward_pre_hook(here(_correct_image(layer, calls)))
        if layer.point.side == "statistics":
            return module.register_forward_pre_hook(here(_replace_statistics(layer, calls)), with_kwargs=True)
        correct = _correct(layer, calls)
        return module.register_forward_hook(here(lambda _module, _args, output: correct(output)))


def _replace_statistics(layer: _Layer, calls: Tensor | None) -> Any:
    """What happens before a layer with running statistics: a share of the frame's own takes their place."""
    norm = layer.point.module
    buffers = norm._buffers  # assigning an attribute of a module takes longer than the arithmetic
    running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    assert running_mean is not None
    assert running_var is not None

    def before(_norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        values = x.numel() // len(running_mean)
        if calls is not None:
            calls.add_(1.0)
        if values == 1:  # one value has no deviation
            buffers["running_mean"], buffers["running_var"] = running_mean, running_var
            return
        mean, variance = channel_moments(x, 1)
        own = layer.finite(torch.stack((mean, variance.sqrt())))
        share = layer.share(own).to(running_mean)
        buffers["running_mean"] = running_mean.lerp(own[0].to(running_mean), share)
        buffers["running_var"] = running_var.lerp((own[1].square() * layer.unbiased(values)).to(running_var), share)

    return before


def _correct(layer: _Layer, calls: Tensor | None) -> Any:
    """What happens to the output of a layer: it is shifted and scaled toward the source."""
    point, checked = layer.point, False

    def correct(output: Any) -> Any:
        nonlocal checked
        x = first_tensor(output)
        assert x is not None
        if not checked:
            _check(point, x)
            checked = True
        if calls is not None:
            calls.add_(1.0)
        mean, variance = point.moments(x.detach())
        own = layer.finite(torch.stack((mean, variance.sqrt())))
        blended = layer.moments.lerp(own.to(layer.moments), layer.share(own).to(layer.moments))
        factor = layer.std / blended[1].clamp_min(layer.floor)
        shift = torch.addcmul(layer.moments[0], blended[0], factor, value=-1.0)
        factor, shift = (point.along_channels(v).to(x.dtype) for v in (factor, shift))
        corrected = torch.addcmul(shift, point.patches(x), factor)
        if point.prefix:
            corrected = torch.cat([x[:, : point.prefix], corrected], 1)
        return (corrected, *output[1:]) if isinstance(output, tuple) else corrected

    return correct


def _correct_image(layer: _Image, calls: Tensor | None) -> Any:
    """What happens to the image: its tones are moved toward those of the source."""

    checked = False

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal checked
        x = args[0]
        if not checked:
            _check(layer.point, x)
            checked = True
        if calls is not None:
            calls.add_(1.0)
        own = layer.finite(levels_of(x.detach()))
        wanted = own.lerp(layer.mean.to(own), layer.share(own).to(own))
        return along_curve(x, own, wanted), *args[1:]

    return before


def _check(point: Point, x: Tensor) -> None:
    """Refuse a tensor of another layout or width than a point has.

    Raises:
        ConfigError: it has.
    """
    axis = 1 if point.layout == "nchw" else -1
    fits = x.ndim == (3 if point.layout == "tokens" else 4) and x.shape[axis] == point.channels
    if not fits or (point.prefix and x.shape[1] <= point.prefix):
        raise ConfigError(
            f"the calibration has {point.channels} channels, {point.layout}, at {point.name!r}; the model gives "
            f"{tuple(x.shape)} there: calibrate the model again"
        )


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module, to see on which device it is."""
    yield from module.parameters()
    yield from module.buffers()


class _Image:
    """The numbers of the image, as a pass needs them, on the device of the layer that sees it.

    Args: as those of `_Layer`.
    """

    def __init__(
        self, point: Point, statistics: PointStatistics, rule: Rule, seen: Tensor, device: torch.device | None
    ) -> None:
        self.point, self._seen = point, seen
        place = next((x.device for x in _own_tensors(point.module)), device)
        self.mean = statistics.mean.to(place)
        self._std = above_zero(statistics.std).to(place)
        self._per_channel, self._largest = rule.per == "channel", rule.largest
        self._threshold = statistics.threshold(rule.at_image()).to(place)
        self._unit = (1.0 / statistics.layer_usual.clamp_min(1e-12)).to(seen.device)

    def finite(self, own: Tensor) -> Tensor:
        """Levels [C, LEVELS], with those of the source in channels that have NaN or infinite ones: they stay as is."""
        return torch.where(own.isfinite().all(1, keepdim=True), own, self.mean.to(own))

    def share(self, own: Tensor) -> Tensor:
        """Share of the way to the source's tones: [C, 1], or a scalar for all channels.

        Args:
            own: [C, LEVELS].
        """
        d = tone_divergence(own.to(self.mean), self.mean, self._std)  # [C]
        self._seen.addcmul_(d.mean().to(self._seen.device), self._unit)
        d = d.unsqueeze(1) if self._per_channel else d.mean()
        threshold = self._threshold.unsqueeze(1) if self._per_channel else self._threshold
        return (1.0 - threshold / d).nan_to_num_(0.0, 0.0, 0.0).clamp_(0.0, self._largest)


class _Layer:
    """The numbers of one point, as a pass needs them, on the device of its layer.

    Args:
        point: which.
        statistics: of the source.
        rule: how it is corrected.
        seen: scalar, to which every call adds its divergence, in units of what is usual.
        device: of the point, if it has no tensor of its own.
    """

    def __init__(
        self, point: Point, statistics: PointStatistics, rule: Rule, seen: Tensor, device: torch.device | None
    ) -> None:
        self.point, self._seen = point, seen
        moments = torch.stack((statistics.mean, statistics.std))
        self.moments = moments = moments.to(next((x.device for x in _own_tensors(point.module)), device))
        self.floor = moments[1].max() * 1e-4 + torch.finfo(moments.dtype).tiny
        self.std = moments[1].clamp_min(self.floor)
        self._scale = (1.0 / self.std).expand(2, -1).contiguous()
        # d is the square of these plus what was seen, times the scale
        self._offset = torch.stack((-moments[0] / self.std, torch.full_like(self.std, -1.0)))
        self._per_channel, channels = rule.per == "channel", moments.shape[1]
        threshold = statistics.threshold(rule).to(moments)
        self._minus_threshold = -threshold if self._per_channel else threshold * -channels
        self._one = torch.ones_like(self.floor)
        self._unit = (1.0 / (statistics.layer_usual.to(moments).clamp_min(1e-12) * channels)).to(seen.device)
        self._largest = rule.largest
        self._unbiased: dict[int, Tensor] = {}

    def finite(self, own: Tensor) -> Tensor:
        """Moments [2, C], with those of the source where they are not finite: one overflow stays where it is."""
        return torch.where(own.isfinite(), own, self.moments)

    def unbiased(self, values: int) -> Tensor:
        """The factor that makes the variance of so many values unbiased; kept, since recordings read it again."""
        if values not in self._unbiased:
            with torch.inference_mode(False):
                self._unbiased[values] = self.moments.new_tensor(values / (values - 1))
        return self._unbiased[values]

    def share(self, own: Tensor) -> Tensor:
        """Share of a frame's own statistics: [C], or a scalar for a layer; 0 where they are NaN.

        Args:
            own: [2, C], means and deviations.
        """
        parts = torch.addcmul(self._offset, own, self._scale)  # the two terms of d are their squares
        flat = parts.view(-1)
        total = torch.dot(flat, flat)
        self._seen.addcmul_(total.to(self._seen.device), self._unit)
        d = parts.square().sum(0) if self._per_channel else total
        share = torch.addcdiv(self._one, self._minus_threshold, d)  # 1 - threshold / d
        return share.nan_to_num_(0.0, 0.0, 0.0).clamp_(0.0, self._largest)
