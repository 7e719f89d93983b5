"""Reconstructions as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.view.overlay import to_uint8

if TYPE_CHECKING:
    from ttt_adapt.model.frames import Normalize
    from ttt_adapt.objectives.reconstruction_error import Reconstruction


def reconstruction_image(reconstruction: Reconstruction, x: Tensor, normalize: Normalize) -> np.ndarray:
    """The visible patches as they are, and the hidden ones as they were reconstructed.

    Args:
        reconstruction: what the branch made of `x`.
        x: images as the model takes them, [B, 3, H, W]; the first one is shown.
        normalize: how a frame became `x`.

    Returns:
        uint8 RGB [H, W, 3].
    """
    shown = torch.where(reconstruction.mask, x, reconstruction.prediction)[0]
    return to_uint8(shown, normalize.mean, normalize.std)
