"""What a model is like on its own ground, and how much of a frame's own statistics it is normalised with.

A frame that looks like the source is predicted as the model was trained. The further its statistics are from those of
the source, the more of its own they are replaced by:

    d     = ((mean_frame - mean)^2 + (std_frame - std)^2) / std^2             per channel, or its mean over a layer
    share = clip(1 - strength * usual / d, 0, largest)                        usual: the d of source stills

At the image, d is the distance of its tones from those of the source (`ttt_adapt.model.tone`), and usual is always
their 95th percentile.

A share of this form is that of James and Stein ("Estimation with quadratic loss", 1961): an estimate is shrunk toward
what is known, by the ratio of the variance that is expected to the distance that is seen. Blending BatchNorm's
statistics by a fixed share is of Schneider et al., "Improving robustness against common corruptions by covariate shift
adaptation" (NeurIPS 2020).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.points import KINDS, Point
from ttt_adapt.model.tone import tone_divergence


@dataclass(frozen=True)
class Rule:
    """How calibrated statistics correct a pass.

    Attributes:
        points: kinds of points where passes are corrected (`ttt_adapt.model.points`), with "+" between them, such as
            "batchnorm" or "input+blocks"; "none": nowhere.
        per: "layer": one share for all channels of a point; "channel": one for each.
        margin: what counts as usual: "mean", the mean divergence of the source stills, or "high", their 95th
            percentile.
        strength: factor on what is usual: the larger, the more a frame has to differ before anything happens.
        largest: the largest share of a frame's own statistics, in [0, 1].
    """

    points: str
    per: str = "layer"
    margin: str = "mean"
    strength: float = 1.0
    largest: float = 0.5

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ConfigError(
                f"points has {unknown[0]!r}; expected kinds of {', '.join(KINDS)} with + between, or none"
            )
        choices = {"per": ("layer", "channel"), "margin": ("mean", "high")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, allowed))}")
        if not 0.0 <= self.largest <= 1.0 or not self.strength >= 0.0:
            raise ConfigError(
                f"strength {self.strength!r} must be at least 0, and largest {self.largest!r} between 0 and 1"
            )

    def at_image(self) -> Rule:
        """The rule of the image: usual is what 95 % of the stills show.

        One curve changes all that the model sees, and a blur moves the darkest and brightest tones, too, so the mean
        of the stills would be too little to wait for.
        """
        return dataclasses.replace(self, margin="high")

    @property
    def kinds(self) -> list[str]:
        """The kinds of points, one by one."""
        return [] if self.points == "none" else self.points.split("+")


@dataclass(frozen=True)
class PointStatistics:
    """What the source stills are like at one point.

    Attributes:
        layout: of the point's tensor, see `Point`.
        prefix: leading tokens that are no patches.
        mean: [C], mean over the stills of a channel's mean over space; of BatchNorm its running mean; of the image
            [C, LEVELS], the mean over the stills of its levels.
        std: [C], likewise of its standard deviation.
        usual: [C], mean over the stills of a channel's divergence d.
        high: [C], its 95th percentile.
        layer_usual: scalar, mean over the stills of the mean of d over the channels.
        layer_high: scalar, its 95th percentile.
        layer_shift: scalar, the mean over the channels of the divergence of all stills taken together; of the image 0.
    """

    layout: Any
    prefix: int
    mean: Tensor
    std: Tensor
    usual: Tensor
    high: Tensor
    layer_usual: Tensor
    layer_high: Tensor
    layer_shift: Tensor

    @classmethod
    def of(cls, point: Point, means: Tensor, variances: Tensor) -> PointStatistics:
        """From the moments of every still.

        Args:
            point: where they were measured.
            means: [stills, C], of the image [stills, C, LEVELS].
            variances: [stills, C].
        """
        mean, std = means.mean(0), variances.sqrt().mean(0)
        if point.side == "statistics":
            mean, std = running_moments(point.module, means)
        if point.side == "input":
            d, shift = tone_divergence(means, mean, above_zero(std)), std.new_zeros(())
        else:
            d = divergence(means, variances, mean, std)  # [stills, C]
            together = (variances + means.square()).mean(0) - means.mean(0).square()
            shift = divergence(means.mean(0), together, mean, std).mean()
        layer = d.mean(1)
        high = d.quantile(0.95, 0), layer.quantile(0.95)
        return cls(point.layout, point.prefix, mean, std, d.mean(0), high[0], layer.mean(), high[1], shift)

    def threshold(self, rule: Rule) -> Tensor:
        """The divergence up to which nothing is corrected: [C], or a scalar for a whole layer."""
        if rule.per == "layer":
            return rule.strength * (self.layer_usual if rule.margin == "mean" else self.layer_high)
        return rule.strength * (self.usual if rule.margin == "mean" else self.high)


def running_moments(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and standard deviation of a layer, [C] each, copies; the latter as the layer divides by it."""
    mean, variance = norm.running_mean.detach().to(like), norm.running_var.detach().to(like)
    return mean.clone(), (variance + norm.eps).sqrt()


def varies(means: Tensor, variances: Tensor) -> bool:
    """Whether a point varies over space on some still, by more than rounding; otherwise it has no scale.

    Args:
        means: [stills, C], of the image [stills, C, LEVELS].
        variances: [stills, C].
    """
    rounding = torch.finfo(means.dtype).eps * means.abs().max()
    return bool(variances.sqrt().mean(0).max() > rounding)


def divergence(mean: Tensor, variance: Tensor, source_mean: Tensor, source_std: Tensor) -> Tensor:
    """d of every channel, [..., C]; formula in this module's docstring."""
    std = above_zero(source_std)
    return ((mean - source_mean) / std).square() + ((variance.sqrt() - source_std) / std).square()


def above_zero(source_std: Tensor) -> Tensor:
    """Deviations [C] that one can divide by: each at least `least_std`."""
    return source_std.clamp_min(least_std(source_std))


def least_std(source_std: Tensor) -> Tensor:
    """The deviation, a scalar, of channels that are constant in the source and have no scale to compare with.

    It is one ten-thousandth of the largest of the layer.
    """
    return source_std.max() * 1e-4 + torch.finfo(source_std.dtype).tiny
