"""MAEBranch: masking, decoder and reconstruction loss, attached to the encoder of an existing model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, EncoderError, FrameError
from ttt_adapt.model.encoder import EncoderInfo, evaluating, inspect_encoder
from ttt_adapt.model.features import Features, to_maps
from ttt_adapt.model.hooks import hidden_channel, run_encoder, visible_tokens, without_checkpointing
from ttt_adapt.model.norms import frozen_norms
from ttt_adapt.model.parameters import check_state
from ttt_adapt.objectives.base import Attached
from ttt_adapt.objectives.decoders import Decoder, HeadCopy, build_decoder
from ttt_adapt.objectives.masking import (
    hidden_patches,
    pad_to_multiple,
    patchify,
    random_mask,
    unpatchify,
    upsample_mask,
)

SETTINGS = ("mask_ratio", "loss_on", "norm_pix_loss")
"""What the loss of a branch depends on beside images, masks and weights; it may change after attaching."""


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


class MAEBranch(Attached):
    """A masked-autoencoder branch (He et al., 2022) on the encoder of an existing model.

    Make one with `MAEBranch.attach`. The branch reads the model through hooks that exist only during its own passes,
    so an attached model is the model it was. `parameters()` and `state_dict()` hold the decoder and the mask channel
    or mask token; the encoder's weights stay in the model.
    """

    def __init__(
        self,
        info: EncoderInfo,
        decoder: nn.Module,
        *,
        tokens: bool,
        patch_size: int,
        mask_ratio: float,
        loss_on: str,
        norm_pix_loss: bool,
    ) -> None:
        super().__init__(info)
        self.masking = "tokens" if tokens else "pixels"
        self.patch_size, self.mask_ratio = patch_size, mask_ratio
        self.loss_on, self.norm_pix_loss = loss_on, norm_pix_loss
        self.decoder = decoder
        self.multiple = patch_size if tokens else _padding(info, decoder, patch_size)
        if tokens:
            assert info.tokens is not None
            self.mask_token = nn.Parameter(torch.empty(info.tokens.width).normal_(std=0.02))
        else:
            assert info.stem is not None
            self.mask_channel = MaskChannel(info.stem)
        self.to(next(iter(info.parameters.values())))

    @classmethod
    @torch.inference_mode(False)  # weights made under inference mode could never learn
    def attach(
        cls,
        model: nn.Module,
        encoder: str | nn.Module,
        decoder: Decoder = "auto",
        masking: str = "auto",
        patch_size: int = 16,
        mask_ratio: float = 0.8,
        loss_on: str = "masked",
        *,
        norm_pix_loss: bool = False,
        image_size: int | tuple[int, int] | None = None,
    ) -> MAEBranch:
        """Attach a branch to `model`; the model itself stays as it is.

        Args:
            model: any module that takes images [B, 3, H, W].
            encoder: dotted path of the module where the encoder ends, or the module. All that the model runs up to
                and including it is the encoder.
            decoder: "conv", "transformer", "copy_head", a module or a factory; "auto" takes "transformer" with token
                masking and "conv" with pixel masking.
            masking: "pixels" (patches filled with 0, told to the stem by a mask channel), "tokens" (hidden tokens
                are never encoded; plain ViTs only), or "auto": tokens where the encoder allows it.
            patch_size: side of a mask patch in pixels. Token masking hides whole tokens, so there it is rounded to
                the nearest multiple of the model's own patch.
            mask_ratio: share of patches hidden, in (0, 1).
            loss_on: "masked" (hidden patches only) or "all" pixels.
            norm_pix_loss: reconstruct patches normalised to zero mean and unit variance each.
            image_size: (H, W) or side of the images that the model is looked at with; found from it by default.

        Raises:
            ConfigError: a setting out of range.
            EncoderError: the encoder or its stem cannot be used; nothing was changed.
        """
        _check_settings(masking, patch_size, mask_ratio, loss_on, norm_pix_loss)
        info = inspect_encoder(model, encoder, image_size)
        tokens = _choose_masking(masking, info)
        if tokens:
            assert info.tokens is not None
            patch_size = max(round(patch_size / info.tokens.patch_size), 1) * info.tokens.patch_size
        with evaluating(model):
            built = build_decoder(decoder, info.maps, model, info.path, info.probe_images(), tokens)
        branch = cls(
            info,
            built,
            tokens=tokens,
            patch_size=patch_size,
            mask_ratio=mask_ratio,
            loss_on=loss_on,
            norm_pix_loss=norm_pix_loss,
        )
        branch._check_decoder()
        return branch

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruction loss of freshly masked images, with its graph.

        Args:
            images: [B, 3, H, W] as the model takes them, any H x W.
            generator: random source for the masks, on the images' device.

        Returns:
            Mean squared error, a scalar, over the hidden pixels or all of them (`loss_on`).
        """
        return self.loss_of(images, self.draw(images, generator))

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """All that is random about the loss of `images`: the masks."""
        return self.draw_mask(images, generator)

    def loss_of(self, images: Tensor, mask: Tensor) -> Tensor:
        """Reconstruction loss of images masked by what `draw` returned, with its graph."""
        patches = mask[0].numel()
        visible = patches - hidden_patches(patches, self.mask_ratio)
        return self._loss(self._predict(images, mask, visible), images, mask)

    def weight(self, images: Tensor, mask: Tensor) -> Tensor:
        """How many pixels the loss is the mean of, a scalar on the device."""
        h, w = images.shape[-2:]
        if self.loss_on == "all":
            return torch.full((), len(images) * h * w, device=images.device)
        return self._hidden(mask, h, w).sum()

    def settings(self) -> tuple[float | str | bool, ...]:
        """What the loss depends on beside images, masks and weights."""
        return float(self.mask_ratio), self.loss_on, self.norm_pix_loss  # as `SETTINGS` names them

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, *, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Reconstruction:
        """Reconstruct images from their visible patches, without a graph.

        Args:
            images: [B, 3, H, W] as the model takes them.
            mask: bool [B, H / patch_size, W / patch_size] (rounded up), True = visible, with as many visible patches in
                every image; drawn without it.
            generator: random source for the masks, on the images' device.

        Raises:
            ConfigError: a mask of another shape or type, or with another number of visible patches per image.
        """
        expected = (len(self.checked(images)), *self._grid(images))
        mask = self.draw_mask(images, generator) if mask is None else mask
        if tuple(mask.shape) != expected or mask.dtype is not torch.bool:
            raise ConfigError(f"the mask is {tuple(mask.shape)} {mask.dtype}; expected bool {expected}")
        visible = set(mask.flatten(1).sum(1).tolist())
        if len(visible) != 1 or visible == {mask[0].numel()}:
            raise ConfigError(
                f"the masks show {sorted(visible)} of {mask[0].numel()} patches; expected as many in every image, and "
                "at least one hidden"
            )
        prediction = self._predict(images, mask, visible.pop())
        loss = self._loss(prediction, images, mask)
        if self.norm_pix_loss:
            prediction = self._denormalise(prediction, images)
        h, w = images.shape[-2:]
        return Reconstruction(prediction[..., :h, :w], upsample_mask(mask, self.patch_size)[..., :h, :w], loss)

    def draw_mask(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random mask per image: bool [B, ceil(H / p), ceil(W / p)], True = visible."""
        b = len(self.checked(images))
        return random_mask(b, self._grid(images), self.mask_ratio, generator=generator, device=images.device)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches, those that the images do not fill included."""
        return -(-images.shape[-2] // self.patch_size), -(-images.shape[-1] // self.patch_size)

    def _predict(self, images: Tensor, mask: Tensor, visible: int) -> Tensor:
        """g(f(masked images)), [B, 3, H, W] of the padded images; `visible` patches in each mask."""
        padded = pad_to_multiple(images, self.multiple)
        with frozen_norms(self.norms), without_checkpointing(self.info.checkpointing):
            try:
                raw = self._encode(padded, mask, visible)
            except AssertionError as error:  # how timm refuses a size
                raise FrameError(
                    f"the model does not take images of {tuple(images.shape[-2:])} (H, W), padded to "
                    f"{tuple(padded.shape[-2:])}: {error}"
                ) from error
            size = (padded.shape[-2], padded.shape[-1])
            prediction = self.decoder(Features(to_maps(raw, self.info.maps, size), raw, size))
        return prediction[..., : size[0], : size[1]]

    def _encode(self, padded: Tensor, mask: Tensor, visible: int) -> Any:
        info = self.info
        if info.tokens is not None and self.masking == "tokens":
            order, tokens = self._token_order(mask, visible, info.tokens.patch_size)
            with visible_tokens(info.tokens, order, tokens, self.mask_token):
                return run_encoder(info.model, info.module, padded)
        assert info.stem is not None
        pixels = self._pixel_mask(mask, padded)
        with hidden_channel(info.stem, self.mask_channel, 1 - pixels):
            return run_encoder(info.model, info.module, padded * pixels)

    def _pixel_mask(self, mask: Tensor, padded: Tensor) -> Tensor:
        """1 = visible, [B, 1, H, W] of the padded images; padding that no patch covers is visible."""
        h, w = padded.shape[-2:]
        pixels = upsample_mask(mask, self.patch_size).to(padded.dtype)[..., :h, :w]
        return F.pad(pixels, (0, w - pixels.shape[-1], 0, h - pixels.shape[-2]), value=1.0)

    def _token_order(self, mask: Tensor, visible: int, token: int) -> tuple[Tensor, int]:
        """The visible tokens of each image in row-major order, int64 [B, n], and the number of all tokens."""
        times = self.patch_size // token
        tokens = mask.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)
        order = tokens.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return order[:, : visible * times**2], tokens.shape[1]

    def _loss(self, prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        target = self._normalise(images) if self.norm_pix_loss else images
        prediction = prediction[..., :h, :w]
        if target.dtype in (torch.float16, torch.bfloat16):  # sums of squares overflow in half precision
            prediction, target = prediction.float(), target.float()
        error = (prediction - target[..., :h, :w]).square().mean(1, keepdim=True)
        if self.loss_on == "all":
            return error.mean()
        hidden = self._hidden(mask, h, w)
        return (error * hidden).sum() / hidden.sum()

    def _hidden(self, mask: Tensor, height: int, width: int) -> Tensor:
        """bool [B, 1, H, W], the pixels that the mask hides."""
        return ~upsample_mask(mask, self.patch_size)[..., :height, :width]

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        padded = pad_to_multiple(images, self.patch_size)
        patches = patchify(padded, self.patch_size)
        grid = (padded.shape[-2] // self.patch_size, padded.shape[-1] // self.patch_size)
        return patches, (patches.var(-1, keepdim=True) + 1e-6).sqrt(), grid

    def _normalise(self, images: Tensor) -> Tensor:
        patches, std, grid = self._statistics(images)
        return unpatchify((patches - patches.mean(-1, keepdim=True)) / std, self.patch_size, grid)

    def _denormalise(self, prediction: Tensor, images: Tensor) -> Tensor:
        patches, std, grid = self._statistics(images)
        h, w = images.shape[-2:]
        prediction = pad_to_multiple(prediction[..., :h, :w], self.patch_size)
        scaled = patchify(prediction, self.patch_size) * std + patches.mean(-1, keepdim=True)
        return unpatchify(scaled, self.patch_size, grid)

    def _check_decoder(self) -> None:
        images = self.info.probe_images()
        with evaluating(self.model), evaluating(self), torch.no_grad():
            mask = self.draw_mask(images, torch.Generator(images.device).manual_seed(0))
            try:
                prediction = self._predict(images, mask, int(mask[0].sum()))
            except (RuntimeError, FrameError, ValueError, IndexError) as error:
                raise EncoderError(
                    f"a masked pass over images {tuple(images.shape)}, padded to multiples of {self.multiple}, failed "
                    f"in the model or the decoder: {error}. Models of one size need a patch_size that divides it"
                ) from error
        if prediction.shape != pad_to_multiple(images, self.multiple).shape:
            raise EncoderError(
                f"the decoder returned {tuple(prediction.shape)} for images {tuple(images.shape)}; "
                "expected [B, 3, H, W]: it must predict 3 x s x s channels at its stride s"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `torch.nn.Module.load_state_dict`, but a state of another branch changes nothing.

        Raises:
            CheckpointError: keys or shapes differ; the message names them.
        """
        check_state(self.state_dict(), state_dict, "this branch")
        return super().load_state_dict(state_dict, strict, assign)

    @contextmanager
    def using(self, **settings: Any) -> Iterator[MAEBranch]:
        """Another `mask_ratio`, `loss_on` or `norm_pix_loss` inside the block: what is hidden and scored at test time.

        Raises:
            ConfigError: another name, or a value out of range; before anything changes.
        """
        if unknown := [name for name in settings if name not in SETTINGS]:
            raise ConfigError(
                f"{', '.join(map(repr, unknown))} cannot change after attaching; {', '.join(SETTINGS)} can"
            )
        own = dict(zip(SETTINGS, self.settings(), strict=True))
        wanted: dict[str, Any] = {**own, **settings}
        _check_settings(self.masking, self.patch_size, **wanted)
        vars(self).update(settings)
        try:
            yield self
        finally:
            vars(self).update(own)

    def extra_repr(self) -> str:
        """The settings, for `print(branch)`."""
        return f"masking={self.masking!r}, patch_size={self.patch_size}, mask_ratio={self.mask_ratio}"


class MaskChannel(nn.Module):
    """The fourth input channel of a stem convolution, on its own: 1 = hidden. It starts at zero."""

    def __init__(self, stem: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(stem.out_channels, 1, *stem.kernel_size))
        self.stride, self.dilation, self.padding = stem.stride, stem.dilation, stem.padding
        self.same = type(stem).__name__ == "Conv2dSame"  # timm's: padded as TensorFlow does

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, 1, H, W] -> [B, C, h, w], the shape of the stem's output."""
        if self.same:
            hidden = self._pad_same(hidden)
        return F.conv2d(hidden, self.weight, None, self.stride, self.padding, self.dilation)

    def _pad_same(self, hidden: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (1, 0):
            size, stride, kernel = hidden.shape[-2 + axis], self.stride[axis], self.weight.shape[-2 + axis]
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * self.dilation[axis] + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(hidden, pads)


def _padding(info: EncoderInfo, decoder: nn.Module, patch_size: int) -> int:
    """What H and W are padded to multiples of: whole cells of the features that are decoded, and whole patches.

    Encoders round down where a frame holds no whole cell, and a decoder cannot predict what was cut off.
    """
    strides = [spec.stride for spec in info.maps]
    cell = max(
        next((s for s in strides if s >= 4), strides[-1]), decoder.stride if isinstance(decoder, HeadCopy) else 1
    )
    fits = cell % patch_size == 0 or patch_size % cell == 0
    return max(cell, patch_size) if fits else cell


def _choose_masking(masking: str, info: EncoderInfo) -> bool:
    """True for token masking."""
    if masking == "tokens" and info.tokens is None:
        raise EncoderError(
            'masking="tokens" needs a plain transformer whose blocks see all tokens at once (ViT, EVA, DINOv2/v3); '
            f'{type(info.module).__name__} is none: use masking="pixels"'
        )
    if masking != "tokens" and info.tokens is None and info.stem is None:
        raise EncoderError('no convolution over the 3-channel images was found, so masking="pixels" has no stem')
    if masking == "pixels" and info.stem is None:
        raise EncoderError('masking="pixels" needs a stem: a convolution over the 3-channel images')
    return masking == "tokens" or (masking == "auto" and info.tokens is not None)


def _check_settings(masking: str, patch_size: int, mask_ratio: float, loss_on: str, norm_pix_loss: bool) -> None:
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
