"""Convert colours between sRGB and CIE L*a*b*, turn pictures grey, and colour grey pictures.

sRGB is that of IEC 61966-2-1 with the white point D65, in [0, 1]. L lies in [0, 100], a and b in about [-110, 110]. The
tensors are float32 or float64, and their axis of 3 channels, `dim`, may be any. The white point is computed from the
conversion matrix (the sum of each row), so that every grey has a = b = 0 exactly.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
"""ITU-R BT.709 primaries, D65; the second row is the luminance Y."""
_EPSILON, _KAPPA = (6 / 29) ** 3, (29 / 3) ** 3
"""Constants of CIE 15: where L*a*b* is linear in XYZ instead of a cube root, and with which slope."""


def linear(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> linear light in [0, 1]."""
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def gamma(light: Tensor) -> Tensor:
    """Linear light in [0, 1] -> sRGB in [0, 1]."""
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def rgb_to_lab(rgb: Tensor, dim: int = -3) -> Tensor:
    """sRGB in [0, 1] -> L, a, b along `dim`."""
    matrix = _matrix(rgb)
    xyz = _mix(matrix / matrix.sum(1, keepdim=True), linear(rgb), dim)
    f = torch.where(xyz > _EPSILON, xyz.clamp_min(_EPSILON) ** (1 / 3), (_KAPPA * xyz + 16) / 116)
    fx, fy, fz = f.unbind(dim)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim)


def lab_to_rgb(lab: Tensor, dim: int = -3) -> Tensor:
    """L, a, b along `dim` -> sRGB in [0, 1] of the same luminance.

    Some L, a, b have no sRGB colour: a channel would be below 0 or above 1. Such a colour is moved toward the grey of
    its luminance, in linear light, until it fits. Clipping the channel instead would change the luminance.
    """
    L, a, b = lab.unbind(dim)
    fy = (L + 16) / 116
    f = torch.stack([fy + a / 500, fy, fy - b / 200], dim)
    xyz = torch.where(f > 6 / 29, f**3, (116 * f - 16) / _KAPPA)
    matrix = _matrix(lab)
    light = _mix(torch.linalg.inv(matrix / matrix.sum(1, keepdim=True)), xyz, dim)
    grey = xyz.select(dim, 1).unsqueeze(dim).clamp(0, 1)
    away = light - grey
    tiny = torch.finfo(lab.dtype).tiny
    share = torch.where(away > 0, 1 - grey, grey) / away.abs().clamp_min(tiny)  # of the way, until a channel is 0 or 1
    return gamma((grey + away * share.amin(dim, keepdim=True).clamp(max=1)).clamp(0, 1)).clamp(0, 1)


def to_grey(rgb: np.ndarray) -> np.ndarray:
    """Turn a picture grey and keep its luminance.

    Args:
        rgb: uint8 RGB [H, W, 3].

    Returns:
        uint8 [H, W, 3] of three equal channels. Its luminance is exact up to the rounding to 256 levels. A picture that
        is grey already does not change.
    """
    tables = _luminance_tables()
    light = sum(table[rgb[..., i]] for i, table in enumerate(tables))  # [H, W]
    grey = np.round(255 * gamma(torch.from_numpy(np.asarray(light))).numpy()).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def colour_frame(grey: np.ndarray, ab: Tensor) -> np.ndarray:
    """Colour a grey picture: its luminance stays.

    Args:
        grey: uint8 [H, W, 3] of three equal channels, as `to_grey` makes it.
        ab: float [2, H, W], a and b of every pixel.

    Returns:
        uint8 RGB [H, W, 3], whose luminance is that of `grey` within half a level.
    """
    levels = torch.from_numpy(np.ascontiguousarray(grey[..., 0])).long()
    lab = torch.cat([_lightness_table()[levels].to(ab)[None], ab])
    return (lab_to_rgb(lab, 0) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _mix(matrix: Tensor, values: Tensor, dim: int) -> Tensor:
    """Multiply the 3 channels along `dim` by a matrix [3, 3]."""
    return torch.tensordot(values.movedim(dim, -1), matrix.T, 1).movedim(-1, dim)


def _matrix(like: Tensor) -> Tensor:
    """The matrix from linear RGB to XYZ [3, 3], with the dtype and on the device of `like`."""
    return torch.tensor(_RGB_TO_XYZ, dtype=like.dtype, device=like.device)


@lru_cache(maxsize=1)
def _luminance_tables() -> np.ndarray:
    """The luminance of each level of red, green and blue, float64 [3, 256]; that of white adds up to 1."""
    levels = linear(torch.arange(256, dtype=torch.float64) / 255).numpy()
    weights = np.array(_RGB_TO_XYZ[1])
    return (weights / weights.sum())[:, None] * levels


@lru_cache(maxsize=1)
def _lightness_table() -> Tensor:
    """L of each level of grey, float64 [256]."""
    greys = (torch.arange(256, dtype=torch.float64) / 255)[:, None].expand(-1, 3)
    return rgb_to_lab(greys, -1)[:, 0]
