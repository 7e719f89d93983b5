"""Decoders: they predict an image from the features of the encoder.

Each takes `Features` and returns [B, 3, h * s, w * s] for a map of h x w cells with a stride of s pixels, which is at
least as large as the image.

- `ConvDecoder`: a feature pyramid of convolutions, for any encoder.
- `TokenDecoder`: a small transformer over the finest map, for plain ViTs.
- `HeadCopy` (`head_copy.py`): a copy of the model's own head with another last layer, as in the paper.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.features import Features, MapSpec
from ttt_adapt.model.map_choice import FINE
from ttt_adapt.objectives.head_copy import HeadCopy


class Pyramid(nn.Module):
    """Top-down feature pyramid with one output map, at the finest stride.

    Source: "Feature Pyramid Networks" (Lin et al., 2017). A 1 x 1 convolution of each map, nearest-neighbour upsampling
    and addition from coarse to fine, then two 3 x 3 convolutions and a 1 x 1 output.

    Args:
        channels: C_i of each input map, finest first.
        out_channels: channels of the output.
        width: inner channels.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, width: int = 64) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.refine = nn.Sequential(*(layer for _ in range(2) for layer in _conv_block(width)))
        self.out = nn.Conv2d(width, out_channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_i, h_i, w_i], finest first -> [B, out_channels, h_0, w_0]."""
        x = self.lateral[-1](maps[-1])  # [B, width, h_i, w_i], of the coarsest map first
        for lateral, finer in zip(list(self.lateral)[-2::-1], list(maps)[-2::-1], strict=True):
            x = lateral(finer) + F.interpolate(x, size=finer.shape[-2:], mode="nearest")
        return self.out(self.refine(x))


def _conv_block(width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(math.gcd(8, width), width), nn.GELU()


class ConvDecoder(nn.Module):
    """A `Pyramid` with 3 * s * s output channels, rearranged to pixels.

    s is the finest stride of at least 4. Finer maps would take most of the time, and a patch does not need them; where
    parameters act on a finer map alone (U-Net), it is read all the same.

    Args:
        specs: the encoder's maps, finest first.
        width: inner channels.
    """

    def __init__(self, specs: Sequence[MapSpec], width: int = 64) -> None:
        super().__init__()
        self.first = finest_decoded(specs)
        self.stride = specs[self.first].stride
        self.pyramid = Pyramid([spec.channels for spec in specs[self.first :]], 3 * self.stride**2, width)

    def forward(self, features: Features) -> Tensor:
        """Features -> image [B, 3, h * s, w * s]."""
        return F.pixel_shuffle(self.pyramid(features.maps[self.first :]), self.stride)


KEPT = 4
"""For how many sizes of the map a token decoder keeps the position embeddings."""


class TokenDecoder(nn.Module):
    """Small transformer over the cells of the finest map, as in MAE (He et al., 2022).

    A linear embedding, fixed sine-cosine positions, `depth` blocks, and a linear prediction of s x s pixels per cell.

    Args:
        specs: the encoder's maps, finest first; the first one has stride s.
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads of a block.
    """

    def __init__(self, specs: Sequence[MapSpec], width: int = 128, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.stride = specs[0].stride
        self.embed = nn.Linear(specs[0].channels, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3 * self.stride**2)
        self._positions: OrderedDict[Any, Tensor] = OrderedDict()

    def forward(self, features: Features) -> Tensor:
        """Features -> image [B, 3, h * s, w * s]."""
        grid = features.maps[0].shape[-2:]
        x = self.embed(features.maps[0].flatten(2).transpose(1, 2))  # [B, h * w, width]
        x = x + self._position(grid[0], grid[1], x)
        for block in self.blocks:
            x = block(x)
        x = self.out(self.norm(x)).transpose(1, 2).unflatten(2, grid)  # [B, 3 * s * s, h, w]
        return F.pixel_shuffle(x, self.stride)

    def _position(self, h: int, w: int, like: Tensor) -> Tensor:
        key = (h, w, like.shape[-1], like.device, like.dtype)
        if key not in self._positions:
            self._positions[key] = sincos_positions(h, w, like.shape[-1]).to(like)
            while len(self._positions) > KEPT:
                self._positions.popitem(last=False)
        self._positions.move_to_end(key)
        return self._positions[key]


class _Block(nn.Module):
    """Transformer block: self-attention and a two-layer MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, C / heads] each
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


def sincos_positions(h: int, w: int, width: int) -> Tensor:
    """Fixed sine-cosine position embedding [h * w, width]: one half of the channels for the row, one for the column."""
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    rows = torch.arange(h, dtype=torch.float64, device="cpu")[:, None] * omega
    cols = torch.arange(w, dtype=torch.float64, device="cpu")[:, None] * omega
    row = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(h, w, -1)
    col = torch.cat([cols.sin(), cols.cos()], 1)[None].expand(h, w, -1)
    return torch.cat([row, col], 2).reshape(h * w, -1).float()


Decoder = str | nn.Module | Callable[[Sequence[MapSpec]], nn.Module]


def build_decoder(
    decoder: Decoder, specs: Sequence[MapSpec], model: nn.Module, path: str, images: Tensor, tokens: bool
) -> nn.Module:
    """Make the decoder that the user asks for.

    Args:
        decoder: "conv", "transformer", "copy_head", a module that takes `Features`, or a function of `specs` that
            returns one. "auto" is "transformer" where tokens are masked and "conv" elsewhere.
        specs: the encoder's maps, finest first.
        model: the user's model.
        path: dotted path of the encoder.
        images: images [1, 3, H, W] to run the model on.
        tokens: whether tokens are masked.

    Raises:
        ConfigError: an unknown name.
        EncoderError: the model's head cannot be copied.
    """
    if isinstance(decoder, nn.Module):
        return decoder
    if callable(decoder):
        return decoder(specs)
    if decoder == "auto":
        decoder = "transformer" if tokens else "conv"
    if decoder == "conv":
        return ConvDecoder(specs)
    if decoder == "transformer":
        return TokenDecoder(specs)
    if decoder == "copy_head":
        return HeadCopy(model, path, images, specs)
    raise ConfigError(
        f'decoder is {decoder!r}; expected "auto", "conv", "transformer", "copy_head", a module, or a function of '
        "the feature maps' specs that returns one"
    )


def finest_decoded(specs: Sequence[MapSpec]) -> int:
    """Which map is the finest that `ConvDecoder` reads: the first with a stride of at least 4, or the last one.

    A finer one is read where parameters act on it that act on no coarser one.
    """
    return next((i for i, spec in enumerate(specs) if spec.stride >= FINE or spec.own), len(specs) - 1)


def padding_multiple(specs: Sequence[MapSpec], decoder: nn.Module, patch_size: int) -> int:
    """The number of pixels that H and W are padded to multiples of, so that the decoder covers the whole image.

    An encoder drops the border of an image that does not fill a whole cell of its features, and no decoder can predict
    what was dropped. The result is one cell or one patch, whichever is larger, if one is a multiple of the other; else
    one cell.

    Args:
        specs: the encoder's maps, finest first.
        decoder: the decoder.
        patch_size: side of a mask patch in pixels.
    """
    cell = specs[finest_decoded(specs)].stride
    if isinstance(decoder, HeadCopy):
        cell = max(cell, decoder.stride)
    nested = cell % patch_size == 0 or patch_size % cell == 0
    return max(cell, patch_size) if nested else cell
