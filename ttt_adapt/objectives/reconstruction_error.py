"""Compare a reconstruction with the original images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_adapt.objectives.masking import normalise_patches, visible_pixels


@dataclass(frozen=True)
class Reconstruction:
    """What the branch makes of masked images.

    Attributes:
        prediction: [B, 3, H, W], in the units of the images.
        mask: bool [B, 1, H, W], True = visible.
        loss: scalar, the reconstruction loss of this mask.
    """

    prediction: Tensor
    mask: Tensor
    loss: Tensor


def reconstruction_error(
    prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, loss_on: str, norm_pix_loss: bool
) -> Tensor:
    """Mean squared error over the pixels that count, a scalar.

    Args:
        prediction: [B, 3, H', W'], at least as large as the images; what lies beyond them does not count.
        images: [B, 3, H, W].
        mask: bool [B, grid_h, grid_w], True = visible.
        patch_size: side of a patch in pixels.
        loss_on: "masked" (hidden patches only) or "all".
        norm_pix_loss: compare with patches of zero mean and unit variance (He et al., 2022).
    """
    h, w = images.shape[-2:]
    target = normalise_patches(images, patch_size) if norm_pix_loss else images
    prediction, target = prediction[..., :h, :w], target[..., :h, :w]  # [B, 3, H, W], without the padding
    if target.dtype in (torch.float16, torch.bfloat16):  # sums of squares overflow in half precision
        prediction, target = prediction.float(), target.float()
    error = (prediction - target).square().mean(1, keepdim=True)  # [B, 1, H, W]
    if loss_on == "all":
        return error.mean()
    hidden = ~visible_pixels(mask, patch_size, (h, w))  # [B, 1, H, W]
    return (error * hidden).sum() / hidden.sum()


def pixels_counted(images: Tensor, mask: Tensor, patch_size: int, loss_on: str) -> Tensor:
    """How many pixels `reconstruction_error` is the mean of, a scalar on the device. Arguments as there."""
    h, w = images.shape[-2:]
    if loss_on == "all":
        return torch.full((), len(images) * h * w, device=images.device)
    return (~visible_pixels(mask, patch_size, (h, w))).sum()
