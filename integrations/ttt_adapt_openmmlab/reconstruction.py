"""A picture of a frame's reconstruction, for MMEngine's visualizer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ttt_adapt import MAEBranch


def reconstruction_picture(branch: MAEBranch, x: Tensor, preprocessor: nn.Module, seed: int) -> np.ndarray:
    """Frame, masked frame and reconstruction side by side.

    Args:
        branch: reconstructs the hidden patches; visible patches are those of the frame.
        x: float [1, 3, H, W] as `preprocessor` made it.
        preprocessor: the model's own; its normalisation is undone.
        seed: of the mask.

    Returns:
        uint8 RGB [H, 3 W, 3].
    """
    made = branch.reconstruct(x, generator=torch.Generator(x.device).manual_seed(seed))
    row = torch.cat([x, x * made.mask, torch.where(made.mask, x, made.prediction)], dim=3)[0]
    return to_rgb(row, preprocessor)


def to_rgb(image: Tensor, preprocessor: nn.Module) -> np.ndarray:
    """Float [3, H, W] as `preprocessor` made it of a BGR image (MMCV's default) -> uint8 RGB [H, W, 3]."""
    if getattr(preprocessor, "_enable_normalize", False):
        scale, shift = preprocessor.get_buffer("std"), preprocessor.get_buffer("mean")
        image = image * scale + shift
    converted = getattr(preprocessor, "channel_conversion", getattr(preprocessor, "_channel_conversion", False))
    if not converted:
        image = image.flip(0)
    return image.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
