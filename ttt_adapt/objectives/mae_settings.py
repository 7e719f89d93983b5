"""Checks of the settings of `MAEBranch`, and the patch size that fits a frame."""

from __future__ import annotations

import math

from ttt_adapt.errors import ConfigError, EncoderError
from ttt_adapt.model.encoder import EncoderInfo


def check_settings(masking: str, patch_size: int, mask_ratio: float, loss_on: str, norm_pix_loss: bool) -> None:
    """Raise a ConfigError for a setting out of range. `MAEBranch.attach` says what each means."""
    if masking not in ("auto", "pixels", "tokens"):
        raise ConfigError(f'masking is {masking!r}; expected "auto", "pixels" or "tokens"')
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ConfigError(f"patch_size is {patch_size!r}; expected a whole number of pixels, at least 1")
    if not isinstance(mask_ratio, int | float) or not 0.0 < mask_ratio < 1.0:
        raise ConfigError(f"mask_ratio is {mask_ratio!r}; expected a number between 0 and 1, such as 0.8")
    if loss_on not in ("masked", "all"):
        raise ConfigError(f'loss_on is {loss_on!r}; expected "masked" or "all"')
    if not isinstance(norm_pix_loss, bool):
        raise ConfigError(f"norm_pix_loss is {norm_pix_loss!r}; expected True or False")


def masks_tokens(masking: str, info: EncoderInfo) -> bool:
    """Whether tokens are masked, rather than pixels.

    Raises:
        EncoderError: the encoder cannot be masked in this way.
    """
    if masking == "tokens" and info.tokens is None:
        raise EncoderError(
            'masking="tokens" needs a plain transformer whose blocks see all tokens at once (ViT, EVA, DINOv2/v3); '
            f'{type(info.module).__name__} is none, for {info.no_tokens}: use masking="pixels"'
        )
    if masking != "tokens" and info.tokens is None and info.stem is None:
        raise EncoderError('no convolution over the 3-channel images was found, so masking="pixels" has no stem')
    if masking == "pixels" and info.stem is None:
        raise EncoderError('masking="pixels" needs a stem: a convolution over the 3-channel images')
    return masking == "tokens" or (masking == "auto" and info.tokens is not None)


def patch_size_for(size: tuple[int, int]) -> int:
    """The side in pixels of a mask patch that fits frames of `size` (H, W): a power of two from 4 to 16.

    It is about 1/32 of the shorter side. That is the proportion of the paper (Wang et al., Test-Time Training on Video
    Streams), where patches of 16 pixels hide 80 % of 512 x 1024 and leave about 410 visible. In smaller frames patches
    of 16 would leave too few to tell anything: 22 of 144 x 192.
    """
    return 2 ** min(max(round(math.log2(min(size) / 32)), 2), 4)
