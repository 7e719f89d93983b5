"""Random patch masks and patch layout: pure functions for any H x W.

Polarity, everywhere in this library: True = visible.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.errors import ConfigError


def random_mask(
    batch: int,
    grid: tuple[int, int],
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one random mask per image, each hiding exactly the same number of patches.

    Args:
        batch: number of independent masks B.
        grid: patches per column and row, (grid_h, grid_w).
        ratio: share of patches to hide, in (0, 1); rounded to whole patches, at least 1 hidden and 1 visible.
        generator: random source on `device`; the global one without it.
        device: where the mask is drawn.

    Returns:
        bool [B, grid_h, grid_w], True = visible.

    Raises:
        ConfigError: the grid has fewer than two patches.
    """
    patches = grid[0] * grid[1]
    visible = patches - hidden_patches(patches, ratio)
    order = torch.rand(batch, patches, generator=generator, device=device).argsort(dim=1)
    mask = torch.zeros(batch, patches, dtype=torch.bool, device=device)
    return mask.scatter_(1, order[:, :visible], True).view(batch, *grid)


def hidden_patches(patches: int, ratio: float) -> int:
    """How many of `patches` a mask of this ratio hides: the nearest whole number in [1, patches - 1]."""
    if patches < 2:
        raise ConfigError(
            f"a frame of {patches} patch(es) cannot be masked, at least 2 are needed: "
            "use larger frames or crops, or a smaller patch_size"
        )
    return min(max(round(ratio * patches), 1), patches - 1)


def upsample_mask(mask: Tensor, patch_size: int) -> Tensor:
    """bool [B, grid_h, grid_w] -> bool [B, 1, grid_h * patch_size, grid_w * patch_size]."""
    return mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2).unsqueeze(1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, H/p * W/p, p * p * C]; patches row by row, pixels row by row, channels last."""
    b, c, h, w = images.shape
    p = patch_size
    if h % p or w % p:
        raise ConfigError(f"images of {h} x {w} are no multiple of patch_size {p}: pad them first")
    x = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """[B, N, p * p * C] -> [B, C, H, W]: the inverse of `patchify`, with grid = (H / p, W / p)."""
    b, _, width = patches.shape
    p = patch_size
    c = width // (p * p)
    x = patches.reshape(b, *grid, p, p, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, c, grid[0] * p, grid[1] * p)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Zero-pad [B, C, H, W] at the bottom and right to whole multiples; returns `images` itself if none is needed."""
    h, w = images.shape[-2:]
    bottom, right = -h % multiple, -w % multiple
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images
