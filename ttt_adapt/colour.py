"""CIE L*a*b* and sRGB (IEC 61966-2-1, D65), and colours that keep a given luminance.

Everything works along a channel axis of 3 anywhere, in the dtype that comes: float32 or float64. L lies in [0, 100], a
and b in about [-110, 110], sRGB in [0, 1]. The white point is the matrix' own (its rows' sums), so that greys have
exactly a = b = 0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
"""ITU-R BT.709 primaries, D65; the second row is the luminance Y."""
_EPSILON, _KAPPA = (6 / 29) ** 3, (29 / 3) ** 3  # CIE 15: below the first, f is a line


def linear(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] as linear light in [0, 1]."""
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def gamma(light: Tensor) -> Tensor:
    """Linear light in [0, 1] as sRGB in [0, 1]."""
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

    A colour outside the gamut is moved toward the grey of its luminance, in linear light, until it is inside: clipping
    its channels would change the luminance.
    """
    L, a, b = lab.unbind(dim)
    fy = (L + 16) / 116
    f = torch.stack([fy + a / 500, fy, fy - b / 200], dim)
    xyz = torch.where(f > 6 / 29, f**3, (116 * f - 16) / _KAPPA)
    matrix = _matrix(lab)
    light = _mix(torch.linalg.inv(matrix / matrix.sum(1, keepdim=True)), xyz, dim)
    grey = xyz.select(dim, 1).unsqueeze(dim).clamp(0, 1)
    off = light - grey
    tiny = torch.finfo(lab.dtype).tiny
    room = torch.where(off > 0, 1 - grey, grey) / off.abs().clamp_min(tiny)  # how far each channel may go
    return gamma((grey + off * room.amin(dim, keepdim=True).clamp(max=1)).clamp(0, 1)).clamp(0, 1)


def to_grey(rgb: np.ndarray) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> the grey of the same luminance, uint8 [H, W, 3] of three equal channels.

    A grey picture comes back as it is. The luminance is exact up to the rounding to 256 levels of grey.
    """
    tables = _luminance_tables()
    light = sum(table[rgb[..., i]] for i, table in enumerate(tables))
    grey = np.round(255 * gamma(torch.from_numpy(np.asarray(light))).numpy()).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def colour_frame(grey: np.ndarray, ab: Tensor) -> np.ndarray:
    """The picture with the luminance of `grey` and the colours `ab`.

    Args:
        grey: uint8 [H, W, 3] of three equal channels, as `to_grey` makes it.
        ab: float [2, H, W], a and b.

    Returns:
        uint8 RGB [H, W, 3], whose luminance is that of `grey` within half a level.
    """
    levels = torch.from_numpy(np.ascontiguousarray(grey[..., 0])).long()
    lab = torch.cat([_lightness_table()[levels].to(ab)[None], ab])
    return (lab_to_rgb(lab, 0) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _mix(matrix: Tensor, values: Tensor, dim: int) -> Tensor:
    return torch.tensordot(values.movedim(dim, -1), matrix.T, 1).movedim(-1, dim)


def _matrix(like: Tensor) -> Tensor:
    return torch.tensor(_RGB_TO_XYZ, dtype=like.dtype, device=like.device)


@lru_cache(maxsize=1)
def _luminance_tables() -> np.ndarray:
    """The luminance of every level of red, green and blue, float64 [3, 256], together 1."""
    levels = linear(torch.arange(256, dtype=torch.float64) / 255).numpy()
    weights = np.array(_RGB_TO_XYZ[1])
    return (weights / weights.sum())[:, None] * levels


@lru_cache(maxsize=1)
def _lightness_table() -> Tensor:
    """L of every level of grey, float64 [256]."""
    greys = (torch.arange(256, dtype=torch.float64) / 255)[:, None].expand(-1, 3)
    return rgb_to_lab(greys, -1)[:, 0]
