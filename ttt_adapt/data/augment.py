"""Augmentation of training samples: random changes of geometry and colour, drawn from one generator."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_adapt.errors import ConfigError


@dataclass(frozen=True)
class Augment:
    """Random changes to a training sample. Every number is drawn uniformly from its range.

    Geometry: the image is scaled, then cropped or padded back to its own size, then perhaps mirrored. Padding repeats
    the image mirrored at its border and has the ignore label, so that no flat border enters the reconstruction loss.

    Colour: hue, saturation, contrast and brightness are one affine map of RGB; gamma, blur and noise follow.
    Values stay in [0, 1].

    Attributes:
        scale: zoom factor; below 1 the image shrinks and is padded.
        flip: probability of a horizontal mirror.
        brightness: factor on all values.
        contrast: factor on the distance from the image's mean grey.
        saturation: factor on the distance from each pixel's grey.
        gamma: exponent on values in [0, 1]; above 1 darkens.
        hue: rotation of the colours about the grey axis, in turns.
        blur: standard deviation of a Gaussian blur, in pixels.
        noise: standard deviation of added Gaussian noise, on values in [0, 1].

    Raises:
        ConfigError: a range is reversed or outside what its meaning allows.
    """

    scale: tuple[float, float] = (0.75, 1.5)
    flip: float = 0.5
    brightness: tuple[float, float] = (0.7, 1.3)
    contrast: tuple[float, float] = (0.7, 1.3)
    saturation: tuple[float, float] = (0.6, 1.4)
    gamma: tuple[float, float] = (0.7, 1.4)
    hue: tuple[float, float] = (-0.03, 0.03)
    blur: tuple[float, float] = (0.0, 0.0)
    noise: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.flip <= 1.0:
            raise ConfigError(f"flip is {self.flip}; expected a probability in [0, 1]")
        for name in (field.name for field in fields(self) if field.name != "flip"):
            low, high = getattr(self, name)
            least = -0.5 if name == "hue" else 0.0
            if not least <= low <= high or (name in ("scale", "gamma") and low == 0.0):
                raise ConfigError(
                    f"{name} is ({low}, {high}); expected (low, high), both at least {least}, "
                    "for scale and gamma above 0"
                )

    def __call__(
        self, image: Tensor, labels: Tensor, generator: torch.Generator, ignore: int = 255
    ) -> tuple[Tensor, Tensor]:
        """Changes one sample.

        Args:
            image: `float32 [3, H, W]`, RGB in [0, 1].
            labels: `int64 [H, W]`.
            generator: where all randomness comes from; a CPU generator.
            ignore: the label of padding.

        Returns:
            The new image and labels, of the same shapes and ranges.
        """
        draws = torch.rand(11, generator=generator, dtype=torch.float64).tolist()
        scale = _between(self.scale, draws[0])
        image, labels = _zoom(image, labels, scale, (draws[1], draws[2]), ignore)
        if draws[3] < self.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        image = _recolour(
            image,
            hue=_between(self.hue, draws[4]),
            saturation=_between(self.saturation, draws[5]),
            contrast=_between(self.contrast, draws[6]),
            brightness=_between(self.brightness, draws[7]),
        ).pow_(_between(self.gamma, draws[8]))
        image = _blur(image, _between(self.blur, draws[9]))
        noise = _between(self.noise, draws[10])
        if noise > 0.0:
            image = (image + noise * torch.randn(image.shape, generator=generator)).clamp_(0.0, 1.0)
        return image.contiguous(), labels.contiguous()


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _zoom(
    image: Tensor, labels: Tensor, scale: float, place: tuple[float, float], ignore: int
) -> tuple[Tensor, Tensor]:
    """Cuts out a window of 1 / scale times the image's size, and resizes it to the image's size.

    `place`, both numbers in [0, 1], says where the window lies: 0 at the upper or left border, 1 at the lower or right
    one. A window that is larger than the image sees the image mirrored around it, with the label `ignore`.
    """
    sizes = labels.shape
    windows = [max(1, round(size / scale)) for size in sizes]
    if windows == list(sizes):
        return image, labels
    sources, picks, outside = [], [], []
    for size, window, where in zip(sizes, windows, place, strict=True):
        first = round((size - window) * where)
        rows = torch.arange(first, first + window)
        sources.append((size - 1 - (rows % max(1, 2 * size - 2) - (size - 1)).abs()).clamp_(min=0))
        nearest_row = rows[((torch.arange(size) + 0.5) * (window / size)).long().clamp_(max=window - 1)]
        picks.append(nearest_row.clamp(0, size - 1))
        outside.append((nearest_row < 0) | (nearest_row >= size))
    image = image.index_select(1, sources[0]).index_select(2, sources[1])
    image = F.interpolate(image[None], tuple(sizes), mode="bilinear", align_corners=False, antialias=True)[0]
    labels = labels.index_select(0, picks[0]).index_select(1, picks[1])
    return image, labels.masked_fill(outside[0][:, None] | outside[1], ignore)


# Luma and the two chroma axes of YIQ (NTSC 1953): rotating the chroma plane turns the hue and keeps the luma.
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = torch.linalg.inv(_TO_YIQ)


def _recolour(image: Tensor, hue: float, saturation: float, contrast: float, brightness: float) -> Tensor:
    """Changes hue, saturation, contrast and brightness of `[3, H, W]` by one affine map; clamped to [0, 1]."""
    angle = torch.tensor(2.0 * torch.pi * hue)
    turn = torch.eye(3)
    turn[1:, 1:] = saturation * torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    mixing = brightness * contrast * (_FROM_YIQ @ turn @ _TO_YIQ)
    grey = (_TO_YIQ[0] @ image.mean(dim=(1, 2))).item()
    pixels = mixing @ image.reshape(3, -1)
    return pixels.add_(brightness * (1.0 - contrast) * grey).clamp_(0.0, 1.0).view(image.shape)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of `[3, H, W]`, mirrored at the border. Below a tenth of a pixel it changes nothing."""
    radius = min(int(3.0 * sigma + 0.5), *(size - 1 for size in image.shape[1:]))
    if sigma < 0.1 or radius < 1:
        return image
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    padded = F.pad(image[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[..., None]), kernel[:, :, None])[:, 0].clamp_(0.0, 1.0)
