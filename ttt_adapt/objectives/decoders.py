"""g: the reconstruction decoders. Each maps `Features` to an image [B, 3, h * s, w * s] at least as large as the input.

- `ConvDecoder`: a top-down pyramid; for any encoder with maps.
- `TokenDecoder`: a light transformer over the finest map; for plain ViTs.
- `HeadCopy`: a copy of the model's own head with another last layer, as in the paper.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, EncoderError
from ttt_adapt.model.features import Features, MapSpec
from ttt_adapt.model.hooks import hooks, run_encoder


class Pyramid(nn.Module):
    """Top-down feature pyramid with one output map at the finest stride.

    After "Feature Pyramid Networks" (Lin et al., 2017): a 1 x 1 convolution per map, nearest-neighbour upsampling and
    addition from coarse to fine, then two 3 x 3 convolutions and a 1 x 1 output.

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
        x = self.lateral[-1](maps[-1])
        for lateral, finer in zip(list(self.lateral)[-2::-1], list(maps)[-2::-1], strict=True):
            x = lateral(finer) + F.interpolate(x, size=finer.shape[-2:], mode="nearest")
        return self.out(self.refine(x))


def _conv_block(width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(math.gcd(8, width), width), nn.GELU()


class ConvDecoder(nn.Module):
    """Convolutional pyramid decoder: `Pyramid` to 3 * s * s channels at stride s, then pixel shuffle.

    s is the finest stride of at least 4: finer maps cost most of the time and patches of pixels do not need them.
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
"""Grids whose positions a token decoder keeps."""


class TokenDecoder(nn.Module):
    """Light transformer decoder over the patch tokens, after MAE (He et al., 2022).

    A linear embedding, fixed 2-D sine-cosine positions, `depth` pre-norm blocks, and a linear prediction of p x p
    pixels per token.
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
        x = self.embed(features.maps[0].flatten(2).transpose(1, 2))
        x = x + self._position(grid[0], grid[1], x)
        for block in self.blocks:
            x = block(x)
        x = self.out(self.norm(x)).transpose(1, 2).unflatten(2, grid)
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
    """Pre-norm transformer block: self-attention and a two-layer MLP, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


def sincos_positions(h: int, w: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding [h * w, width]; half the channels for the row, half for the column."""
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    rows = torch.arange(h, dtype=torch.float64)[:, None] * omega
    cols = torch.arange(w, dtype=torch.float64)[:, None] * omega
    row = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(h, w, -1)
    col = torch.cat([cols.sin(), cols.cos()], 1)[None].expand(h, w, -1)
    return torch.cat([row, col], 2).reshape(h * w, -1).float()


class HeadCopy(nn.Module):
    """A copy of everything behind the encoder, whose last layer predicts pixels (the paper's choice of g).

    The copied head keeps the trained weights of the original; only its last convolution is new, with 3 * s * s
    outputs at its stride s, pixel-shuffled to the frame. What the model does after that layer (upsampling, softmax)
    is left out.

    Args:
        model: the user's model; it is not changed.
        path: where in the model the encoder is; that module must hold all of the encoder.
        images: probe images [1, 3, H, W].

    Raises:
        EncoderError: the encoder is not one module of its own, or no convolution follows it.
    """

    def __init__(self, model: nn.Module, path: str, images: Tensor) -> None:
        super().__init__()
        if not path:
            raise EncoderError("copy_head needs a head behind the encoder, but the encoder is the whole model")
        encoder, stub = model.get_submodule(path), _Stub()
        head = copy.deepcopy(model, {id(encoder): stub})
        with torch.no_grad():
            stub.output = run_encoder(model, encoder, images)
            last, shape = _last_convolution(head, images)
        self.stride = -(-images.shape[-2] // shape[-2])
        _set_outputs(head, last, 3 * self.stride**2)
        self.head, self.path, self.last = head.requires_grad_(True), path, last
        self._freeze_unused(images)
        stub.output = None

    @torch.no_grad()
    def renew(self, model: nn.Module) -> None:
        """Take the weights of the head of `model` again, in place; the new last layer stays as it is."""
        own = self.head.state_dict()
        for name, tensor in model.state_dict().items():
            if name in own and name.rpartition(".")[0] != self.last:
                own[name].copy_(tensor)

    def _freeze_unused(self, images: Tensor) -> None:
        with torch.enable_grad():
            out = run_encoder(self.head, self.head.get_submodule(self.last), images)
            parameters = list(self.head.parameters())
            gradients = torch.autograd.grad(out.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def forward(self, features: Features) -> Tensor:
        """Features -> image [B, 3, h * s, w * s]."""
        stub = self.head.get_submodule(self.path)
        assert isinstance(stub, _Stub)
        stub.output = features.raw
        like = features.maps[0]
        images = like.new_zeros(1).expand(like.shape[0], 3, *features.image_size)  # only its shape is looked at
        try:
            out = run_encoder(self.head, self.head.get_submodule(self.last), images)
        finally:
            stub.output = None
        return F.pixel_shuffle(out, self.stride)


class _Stub(nn.Module):
    """Stands in the place of the encoder and returns features computed elsewhere."""

    output: Any = None

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.output


def _last_convolution(head: nn.Module, images: Tensor) -> tuple[str, torch.Size]:
    """Name and output shape of the last Conv2d that `head(images)` runs."""
    ran: list[tuple[str, torch.Size]] = []

    def record(name: str) -> Any:
        return lambda _module, _args, output: ran.append((name, output.shape))

    before: list[str] = []

    def reached(_module: nn.Module, _args: Any, _output: Any) -> None:
        before.extend(name for name, _ in ran)
        ran.clear()

    handles = [m.register_forward_hook(record(n)) for n, m in head.named_modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_hook(reached) for m in head.modules() if isinstance(m, _Stub)]
    with hooks(handles):
        head(images)
    if before:
        raise EncoderError(
            f"copy_head needs an encoder that is one module: {before[0]!r} runs before the module that was named, so "
            'it would be copied with the head; name a module that holds all of the encoder, or use decoder="conv"'
        )
    if not ran or 1 in ran[-1][1][-2:]:
        raise EncoderError(
            "copy_head needs a head that ends in a convolution over a map, as segmentation heads do; "
            'this model has none behind its encoder: use decoder="conv"'
        )
    return ran[-1]


def _set_outputs(head: nn.Module, name: str, channels: int) -> None:
    """Replace the convolution `name` by a new one with `channels` outputs."""
    old = head.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    kernel, stride, padding, dilation = old.kernel_size, old.stride, old.padding, old.dilation
    new = nn.Conv2d(old.in_channels, channels, kernel, stride, padding, dilation).to(old.weight)  # type: ignore[arg-type]
    parent, _, leaf = name.rpartition(".")
    setattr(head.get_submodule(parent), leaf, new)


def finest_decoded(specs: Sequence[MapSpec]) -> int:
    """Which map is the finest that `ConvDecoder` reads: the first with a stride of at least 4, or the last one."""
    return next((i for i, spec in enumerate(specs) if spec.stride >= 4), len(specs) - 1)


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


Decoder = str | nn.Module | Callable[[Sequence[MapSpec]], nn.Module]


def build_decoder(
    decoder: Decoder, specs: Sequence[MapSpec], model: nn.Module, path: str, images: Tensor, tokens: bool
) -> nn.Module:
    """The decoder that `decoder` names: "auto", "conv", "transformer", "copy_head", a module, or a factory.

    "auto" is the transformer where tokens are masked, and the convolutional pyramid elsewhere. A factory is called
    with the map specs and returns a module that takes `Features`.
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
        return HeadCopy(model, path, images)
    raise ConfigError(
        f'decoder is {decoder!r}; expected "auto", "conv", "transformer", "copy_head", a module, or a function of '
        "the feature maps' specs that returns one"
    )
