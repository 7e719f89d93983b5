"""The picture that a reconstruction makes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.objectives.mae import Reconstruction
from ttt_adapt.stream.frames import Normalize
from ttt_adapt.view.overlay import to_uint8


def reconstruction_image(seen: Reconstruction, x: Tensor, normalize: Normalize) -> np.ndarray:
    """Visible patches as they are, hidden ones as they were reconstructed.

    Args:
        seen: what `MAEBranch.reconstruct` made of `x`.
        x: the frame as the model takes it, [1, 3, H, W].
        normalize: what made `x`; its normalisation is undone.

    Returns:
        uint8 RGB [H, W, 3].
    """
    return to_uint8(torch.where(seen.mask, x, seen.prediction)[0], normalize.mean, normalize.std)
