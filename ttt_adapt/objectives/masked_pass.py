"""One pass of the encoder over masked images: hidden pixels are blanked, or hidden tokens are left out."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ttt_adapt.model.encoder import EncoderInfo
from ttt_adapt.model.hooks import hidden_channel, run_encoder, visible_tokens
from ttt_adapt.model.places import StemViews, moved_to
from ttt_adapt.model.stem import hidden_on_map
from ttt_adapt.objectives.map_mask_channel import MapMaskChannel
from ttt_adapt.objectives.mask_channel import MaskChannel
from ttt_adapt.objectives.masking import visible_pixels, visible_tokens_first


class Encoded(NamedTuple):
    """What the encoder makes of masked images.

    Attributes:
        raw: what it returns.
        size: (H, W) of what its features cover: the images, with the padding that the model adds.
        corner: (top, left), where the images lie in it.
    """

    raw: Any
    size: tuple[int, int]
    corner: tuple[int, int] = (0, 0)


def encode_visible_tokens(
    info: EncoderInfo, images: Tensor, mask: Tensor, visible: int, patch_size: int, mask_token: Tensor
) -> Encoded:
    """Run the encoder's blocks over the tokens of visible patches only.

    Args:
        info: an encoder that allows it.
        images: [B, 3, H, W], in whole patches.
        mask: bool [B, H / patch_size, W / patch_size], True = visible.
        visible: how many patches of each image are visible.
        patch_size: side of a patch in pixels, a multiple of the encoder's own.
        mask_token: [C], stands behind the blocks in the place of each hidden token.
    """
    assert info.tokens is not None
    side = patch_size // info.tokens.patch_size  # tokens along one side of a patch
    order = visible_tokens_first(mask, side)  # [B, N] of all tokens
    kept = order[:, : visible * side**2]  # [B, n]
    with visible_tokens(info.tokens, kept, order.shape[1], mask_token):
        return Encoded(run_encoder(info.model, info.module, images), (images.shape[-2], images.shape[-1]))


def encode_visible_pixels(
    info: EncoderInfo, images: Tensor, mask: Tensor, patch_size: int, channel: MaskChannel, views: StemViews
) -> Encoded:
    """Run the encoder over images whose hidden pixels are 0, and tell its stem which ones these are.

    Args:
        info: an encoder with a stem.
        images: [B, 3, H, W].
        mask: bool [B, grid_h, grid_w], True = visible.
        patch_size: side of a patch in pixels.
        channel: the mask channel of the stem.
        views: of the stem, which say where it sees the pixels.
    """
    assert info.stem is not None
    size = (images.shape[-2], images.shape[-1])
    view = views.at(size)
    shown = visible_pixels(mask, patch_size, size).to(images.dtype)  # [B, 1, H, W]
    told = [1 - shown if places is None else moved_to(places, 1 - shown) for places in view.places]
    with hidden_channel(info.stem, channel, *told):
        return Encoded(run_encoder(info.model, info.module, images * shown), view.size, view.corner)


def encode_on_stem_map(
    info: EncoderInfo, images: Tensor, mask: Tensor, patch_size: int, channel: MapMaskChannel
) -> Encoded:
    """As `encode_visible_pixels`, for a first layer that is no convolution over the images: its output map is told.

    Args:
        info: an encoder with a stem map.
        images: [B, C, H, W].
        mask: bool [B, grid_h, grid_w], True = visible.
        patch_size: side of a patch in pixels.
        channel: the mask channel of the map.
    """
    assert info.stem is not None
    assert info.stem_map is not None
    size = (images.shape[-2], images.shape[-1])
    shown = visible_pixels(mask, patch_size, size).to(images.dtype)  # [B, 1, H, W]
    with hidden_on_map(info.stem, info.stem_map, channel, 1 - shown):
        return Encoded(run_encoder(info.model, info.module, images * shown), size)


def look_once(size: tuple[int, int], channel: MaskChannel, views: StemViews) -> None:
    """Find out, before a pass over images of `size` (H, W), what it has to know about them."""
    for places in views.at(size).places:
        channel.look(size if places is None else (places.shape[0], places.shape[1]))
