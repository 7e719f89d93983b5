"""What a corrected pass does at one point of a model, and the numbers that it needs there.

`Corrected` is what all points have in common; `CorrectedImage`, `CorrectedLayer` (its output) and `CorrectedStatistics`
(of a layer with running ones) are its kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.norms import channel_moments
from ttt_adapt.model.points import Point, first_tensor
from ttt_adapt.model.rule import PointStatistics, Rule, above_zero, least_std
from ttt_adapt.model.tone import along_curve, levels_of, tone_divergence

Around = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Puts something around a hook."""


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module, to see on which device it is."""
    yield from module.parameters()
    yield from module.buffers()


class Corrected(ABC):
    """A point of a model that passes are corrected at.

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
        self.point, self._seen, self._checked = point, seen, False
        self._device = next((x.device for x in own_tensors(point.module)), device)
        self._per_channel, self._largest = rule.per == "channel", rule.largest

    @abstractmethod
    def register(self, around: Around, calls: Tensor | None) -> RemovableHandle:
        """Set the hook of this point.

        Args:
            around: put around the hook.
            calls: scalar that counts the calls of the point; None: nobody counts.
        """

    def _check(self, x: Tensor) -> None:
        """Refuse a first tensor of another layout or width than the point has.

        Raises:
            ConfigError: it has.
        """
        if self._checked:
            return
        point = self.point
        axis = 1 if point.layout == "nchw" else -1
        fits = x.ndim == (3 if point.layout == "tokens" else 4) and x.shape[axis] == point.channels
        if not fits or (point.prefix and x.shape[1] <= point.prefix):
            raise ConfigError(
                f"the calibration has {point.channels} channels, {point.layout}, at {point.name!r}; the model gives "
                f"{tuple(x.shape)} there: calibrate the model again"
            )
        self._checked = True


class CorrectedImage(Corrected):
    """The image: its tones are moved toward those of the source. Arguments as those of `Corrected`."""

    def __init__(
        self, point: Point, statistics: PointStatistics, rule: Rule, seen: Tensor, device: torch.device | None
    ) -> None:
        super().__init__(point, statistics, rule, seen, device)
        self._levels = statistics.mean.to(self._device)
        self._std = above_zero(statistics.std).to(self._device)
        threshold = statistics.threshold(rule.at_image()).to(self._device)
        self._threshold = threshold.unsqueeze(1) if self._per_channel else threshold
        self._unit = (1.0 / statistics.layer_usual.clamp_min(1e-12)).to(seen.device)

    def register(self, around: Around, calls: Tensor | None) -> RemovableHandle:
        """See `Corrected`."""

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            self._check(x)
            if calls is not None:
                calls.add_(1.0)
            own = self._finite(levels_of(x.detach()))
            wanted = own.lerp(self._levels.to(own), self._share(own).to(own))
            return along_curve(x, own, wanted), *args[1:]

        return self.point.module.register_forward_pre_hook(around(before))

    def _finite(self, own: Tensor) -> Tensor:
        """Levels [C, LEVELS], with those of the source in channels that have NaN or infinite ones: they stay as is."""
        return torch.where(own.isfinite().all(1, keepdim=True), own, self._levels.to(own))

    def _share(self, own: Tensor) -> Tensor:
        """Share of the way to the source's tones: [C, 1], or a scalar for all channels.

        Args:
            own: [C, LEVELS].
        """
        d = tone_divergence(own.to(self._levels), self._levels, self._std)  # [C]
        self._seen.addcmul_(d.mean().to(self._seen.device), self._unit)
        d = d.unsqueeze(1) if self._per_channel else d.mean()
        return (1.0 - self._threshold / d).nan_to_num_(0.0, 0.0, 0.0).clamp_(0.0, self._largest)


class CorrectedLayer(Corrected):
    """The output of a layer: it is shifted and scaled toward the source. Arguments as those of `Corrected`."""

    def __init__(
        self, point: Point, statistics: PointStatistics, rule: Rule, seen: Tensor, device: torch.device | None
    ) -> None:
        super().__init__(point, statistics, rule, seen, device)
        self._moments = moments = torch.stack((statistics.mean, statistics.std)).to(self._device)
        self._std, self._floor = above_zero(moments[1]), least_std(moments[1])
        self._scale = (1.0 / self._std).expand(2, -1).contiguous()
        channels = moments.shape[1]
        threshold = statistics.threshold(rule).to(moments).clamp_min(1e-12)  # what is as the source has a share of 0
        self._minus_threshold = -threshold if self._per_channel else threshold * -channels
        self._one = moments.new_ones(())
        self._unit = (1.0 / (statistics.layer_usual.to(moments).clamp_min(1e-12) * channels)).to(seen.device)

    def register(self, around: Around, calls: Tensor | None) -> RemovableHandle:
        """See `Corrected`."""
        point = self.point

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            x = first_tensor(output)
            assert x is not None
            self._check(x)
            if calls is not None:
                calls.add_(1.0)
            away = self._away(*point.moments(x.detach()))
            blended = torch.addcmul(self._moments, away, self._share(away))
            factor = self._std / blended[1].clamp_min(self._floor)
            shift = torch.addcmul(self._moments[0], blended[0], factor, value=-1.0)
            factor, shift = (point.along_channels(v).to(x.dtype) for v in (factor, shift))
            corrected = torch.addcmul(shift, point.patches(x), factor)
            if point.prefix:
                corrected = torch.cat([x[:, : point.prefix], corrected], 1)
            return (corrected, *output[1:]) if isinstance(output, tuple) else corrected

        return point.module.register_forward_hook(around(after))

    def _away(self, mean: Tensor, variance: Tensor) -> Tensor:
        """How far moments [C] are from those of the source: [2, C], of means and deviations.

        It is 0 where they are not finite: one overflow stays where it is.
        """
        return torch.stack((mean, variance.sqrt())).sub_(self._moments).nan_to_num_(0.0, 0.0, 0.0)

    def _share(self, away: Tensor) -> Tensor:
        """Share of a frame's own statistics: [C], or a scalar for a layer.

        Args:
            away: [2, C], see `_away`.
        """
        parts = away * self._scale  # the two terms of d are their squares
        flat = parts.view(-1)
        total = torch.dot(flat, flat)
        self._seen.addcmul_(total.to(self._seen.device), self._unit)
        d = parts.square().sum(0) if self._per_channel else total
        return torch.addcdiv(self._one, self._minus_threshold, d).clamp_(0.0, self._largest)  # 1 - threshold / d


class CorrectedStatistics(CorrectedLayer):
    """A layer with running statistics: a share of the frame's own takes their place for the pass."""

    def register(self, around: Around, calls: Tensor | None) -> RemovableHandle:
        """See `Corrected`."""
        buffers = self.point.module._buffers  # assigning an attribute of a module takes longer than the arithmetic
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
            away = self._away(*channel_moments(x, 1))
            share = self._share(away)
            std = away[1] + self._moments[1]  # the frame's own; its variance counts as unbiased, as in training
            mean = torch.addcmul(running_mean.to(away), away[0], share)
            less = torch.addcmul(running_var.to(away), std, std, value=-values / (values - 1))
            buffers["running_mean"] = mean.to(running_mean)
            buffers["running_var"] = torch.addcmul(running_var.to(away), less, share, value=-1.0).to(running_var)

        return self.point.module.register_forward_pre_hook(around(before), with_kwargs=True)


CORRECTED: dict[str, type[Corrected]] = {
    "input": CorrectedImage,
    "output": CorrectedLayer,
    "statistics": CorrectedStatistics,
}
"""Side of a point -> its kind."""
