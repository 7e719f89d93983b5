"""Random patch masks, and images as patches: functions without state, for any H x W.

A mask is bool with one value per patch, and True = visible everywhere in this library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.errors import ConfigError, FrameSizeError


def random_mask(
    batch: int,
    grid: tuple[int, int],
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one random mask per image. Every mask hides the same number of patches.

    Args:
        batch: number of independent masks B.
        grid: rows and columns of patches, (grid_h, grid_w).
        ratio: share of patches to hide, in (0, 1); rounded to whole patches, at least 1 hidden and 1 visible.
        generator: random source on `device`; PyTorch's global one by default.
        device: where the mask is drawn.

    Returns:
        bool [B, grid_h, grid_w], True = visible.

    Raises:
        ConfigError: the grid has fewer than two patches.
    """
    patches = grid[0] * grid[1]
    visible = patches - hidden_patches(patches, ratio)
    order = torch.rand(batch, patches, generator=generator, device=device).argsort(dim=1)  # [B, patches]
    mask = torch.zeros(batch, patches, dtype=torch.bool, device=device)
    return mask.scatter_(1, order[:, :visible], True).view(batch, *grid)


def hidden_patches(patches: int, ratio: float) -> int:
    """How many of `patches` a mask of this ratio hides: the nearest whole number in [1, patches - 1].

    Raises:
        ConfigError: there are fewer than two patches.
    """
    if patches < 2:
        raise ConfigError(
            f"a frame of {patches} patch(es) cannot be masked, at least 2 are needed: "
            "use larger frames or crops, or a smaller patch_size"
        )
    return min(max(round(ratio * patches), 1), patches - 1)


def patch_grid(size: tuple[int, int] | torch.Size, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of (H, W). A patch that the image fills in part counts too."""
    return -(-size[0] // patch_size), -(-size[1] // patch_size)


def grid_to_mask(size: tuple[int, int] | torch.Size, patch_size: int) -> tuple[int, int]:
    """`patch_grid` of images that are to be masked.

    Raises:
        FrameSizeError: they have fewer than two patches.
    """
    grid = patch_grid(size, patch_size)
    if grid[0] * grid[1] < 2:
        raise FrameSizeError(
            f"images of {size[0]} x {size[1]} (H x W) are one patch of {patch_size} x {patch_size} pixels and cannot "
            "be masked, at least 2 patches are needed: use larger frames or crops, or a smaller patch_size"
        )
    return grid


def count_visible(mask: Tensor, expected: tuple[int, int, int]) -> int:
    """How many patches of each image a mask shows.

    Args:
        mask: bool [B, grid_h, grid_w], True = visible.
        expected: the shape that it should have.

    Raises:
        ConfigError: another shape or type, another number from image to image, or nothing hidden.
    """
    if tuple(mask.shape) != expected or mask.dtype is not torch.bool:
        raise ConfigError(f"the mask is {tuple(mask.shape)} {mask.dtype}; expected bool {expected}")
    visible = set(mask.flatten(1).sum(1).tolist())
    if len(visible) != 1 or visible == {mask[0].numel()}:
        raise ConfigError(
            f"the masks show {sorted(visible)} of {mask[0].numel()} patches; expected the same number in every image, "
            "and at least one hidden"
        )
    return int(visible.pop())


def visible_pixels(mask: Tensor, patch_size: int, size: tuple[int, int] | torch.Size) -> Tensor:
    """The pixels of images of `size` that a mask shows; those outside of all patches are visible.

    Args:
        mask: bool [B, grid_h, grid_w], True = visible.
        patch_size: side of a patch in pixels.
        size: (H, W); patches may reach beyond it, and it may reach beyond the patches.

    Returns:
        bool [B, 1, H, W], True = visible.
    """
    pixels = upsample_mask(mask, patch_size)[..., : size[0], : size[1]]
    bottom, right = size[0] - pixels.shape[-2], size[1] - pixels.shape[-1]
    return F.pad(pixels, (0, right, 0, bottom), value=1.0) if bottom or right else pixels


def upsample_mask(mask: Tensor, patch_size: int) -> Tensor:
    """One value per patch -> one per pixel: [B, grid_h, grid_w] -> [B, 1, grid_h * patch_size, grid_w * patch_size]."""
    return mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2).unsqueeze(1)


def visible_tokens_first(mask: Tensor, tokens_per_side: int) -> Tensor:
    """Number the tokens of an image row by row, and list those of visible patches first, then the others.

    Args:
        mask: bool [B, grid_h, grid_w], True = visible.
        tokens_per_side: how many tokens s lie along one side of a patch.

    Returns:
        int64 [B, grid_h * s * grid_w * s], each part in ascending order.
    """
    tokens = mask.repeat_interleave(tokens_per_side, 1).repeat_interleave(tokens_per_side, 2).flatten(1)
    return tokens.to(torch.uint8).argsort(dim=1, descending=True, stable=True)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches: [B, C, H, W] -> [B, H/p * W/p, p * p * C].

    Patches come row by row, pixels in them row by row, channels last.

    Raises:
        ConfigError: H or W is not a multiple of `patch_size`.
    """
    b, c, h, w = images.shape
    p = patch_size
    if h % p or w % p:
        raise ConfigError(f"images of {h} x {w}: both sides must be multiples of patch_size {p}; pad the images first")
    x = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, H/p, W/p, p, p, C]
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, p * p * C] -> [B, C, H, W], with grid = (H / p, W / p)."""
    b, _, width = patches.shape
    p = patch_size
    c = width // (p * p)
    x = patches.reshape(b, *grid, p, p, c).permute(0, 5, 1, 3, 2, 4)  # [B, C, H/p, p, W/p, p]
    return x.reshape(b, c, grid[0] * p, grid[1] * p)


def normalise_patches(images: Tensor, patch_size: int) -> Tensor:
    """Give every patch zero mean and unit variance: [B, C, H, W] -> the same, zero-padded to whole patches."""
    patches, mean, std = _patch_statistics(images, patch_size)
    return unpatchify((patches - mean) / std, patch_size, patch_grid(images.shape[-2:], patch_size))


def denormalise_patches(normalised: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Undo `normalise_patches(images)` on images of the same size: [B, C, H, W] -> the same, in whole patches."""
    _, mean, std = _patch_statistics(images, patch_size)
    patches = patchify(pad_to_multiple(normalised, patch_size), patch_size)
    return unpatchify(patches * std + mean, patch_size, patch_grid(images.shape[-2:], patch_size))


def _patch_statistics(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The patches [B, N, p * p * C] of images, and the mean and standard deviation [B, N, 1] of each."""
    patches = patchify(pad_to_multiple(images, patch_size), patch_size)
    return patches, patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def padded_size(size: tuple[int, int] | torch.Size, multiple: int) -> tuple[int, int]:
    """(H, W) in whole multiples, of images of `size` (H, W)."""
    h, w = size
    return h + -h % multiple, w + -w % multiple


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Zero-pad [B, C, H, W] at the bottom and right to whole multiples; `images` itself where none is needed."""
    h, w = padded_size(images.shape[-2:], multiple)
    bottom, right = h - images.shape[-2], w - images.shape[-1]
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images
