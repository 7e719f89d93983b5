"""MAEBranch: a masked autoencoder on top of the encoder of an existing model.

The order of this file is that of the algorithm: mask the image, encode what is visible, decode the whole image, and
compare it with the original. What engines and checkpoints use comes next, then how a branch is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, EncoderError, FrameError
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.encoder import EncoderInfo, inspect_encoder
from ttt_adapt.model.features import Features, to_maps
from ttt_adapt.model.frames import Preprocess
from ttt_adapt.model.hooks import without_checkpointing
from ttt_adapt.model.measure import TakenStills, measure, take_stills, with_drifts
from ttt_adapt.model.norms import frozen_norms
from ttt_adapt.model.parameters import check_state
from ttt_adapt.model.places import StemViews
from ttt_adapt.model.probe import evaluating, in_evaluation, returning_as_evaluated
from ttt_adapt.model.wrappers import unwrapped
from ttt_adapt.objectives.base import Attached, examines
from ttt_adapt.objectives.decoders import Decoder, build_decoder, padding_multiple
from ttt_adapt.objectives.head_copy import HeadCopy
from ttt_adapt.objectives.mae_settings import check_settings, masks_tokens
from ttt_adapt.objectives.map_mask_channel import MapMaskChannel
from ttt_adapt.objectives.mask_channel import MaskChannel
from ttt_adapt.objectives.masked_pass import (
    Encoded,
    encode_on_stem_map,
    encode_visible_pixels,
    encode_visible_tokens,
    look_once,
)
from ttt_adapt.objectives.masking import (
    count_visible,
    denormalise_patches,
    grid_to_mask,
    hidden_patches,
    pad_to_multiple,
    padded_size,
    patch_grid,
    random_mask,
    visible_pixels,
)
from ttt_adapt.objectives.reconstruction_error import Reconstruction, pixels_counted, reconstruction_error

SETTINGS = ("mask_ratio", "loss_on", "norm_pix_loss")
"""The settings of a branch that may change after it was attached, in the order of `MAEBranch.settings()`."""


class MAEBranch(Attached):
    """A masked-autoencoder branch (He et al., 2022) on the encoder of an existing model.

    Make one with `MAEBranch.attach`. The branch reads the model through hooks that exist only during its own passes,
    so the model itself does not change. `parameters()` and `state_dict()` hold the decoder and the mask channel or mask
    token; the encoder's weights stay in the model.
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
        self.calibration: Calibration | None = None
        self.multiple = patch_size if tokens else padding_multiple(info.maps, decoder, patch_size)
        self._views: StemViews | None = None
        if tokens:
            assert info.tokens is not None
            self.mask_token = nn.Parameter(torch.empty(info.tokens.width).normal_(std=0.02))
        else:
            self.mask_channel = _mask_channel(info)
            if isinstance(info.stem, nn.Conv2d) and info.stem_map is None:
                self._views = StemViews(info.model, info.module, info.stem, info.checkpointing, info.probe_size)
                padded = padded_size(info.probe_size, self.multiple)
                if padded != info.probe_size and not self._views.takes(padded):
                    self.multiple = 1  # images of its own size alone can be masked; its maps have to cover them whole
        self.to(next(iter(info.parameters.values())))

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruction loss of freshly masked images, with its graph.

        Args:
            images: [B, 3, H, W] as the model takes them, any H x W.
            generator: random source for the masks, on the images' device.

        Returns:
            Mean squared error, a scalar, over the hidden pixels or all of them (`loss_on`).
        """
        mask = self.draw(images, generator)  # bool [B, h, w], True = visible
        return self.loss_of(images, mask)

    def loss_of(self, images: Tensor, mask: Tensor) -> Tensor:
        """The loss of images masked by what `draw` returned, with its graph."""
        prediction = self._predict(images, mask, self._visible_patches(mask))  # [B, 3, H', W'], of the padded images
        return self._error(prediction, images, mask)

    def calibrate(
        self,
        stills: Iterable[Any],
        *,
        preprocess: Preprocess | None = None,
        predict: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> Calibration:
        """Measure what the model and the reconstruction are like on source stills, and keep it in `calibration`.

        No label is needed. A `StreamAdapter` on this branch then corrects frames that are far from the source. For a
        rule and settings that are chosen for the model, use `ttt_adapt.calibrate(model, stills, branch=branch)`.

        Args:
            stills: at least 8 frames of one size, as `StreamAdapter.step` takes them, better some 40: ordinary scenes.
            preprocess: as in `StreamAdapter`.
            predict: as in `StreamAdapter`.
            seed: of the masks.

        Raises:
            ConfigError: too few stills, or a model without any point to measure at.
            FrameError, FrameTypeError: a still cannot be used; nothing has changed.
        """
        model = unwrapped(self.model)
        taken = take_stills(model, stills, preprocess)
        self.calibration = with_drifts(model, self.measured(taken, predict, seed), taken, predict)
        return self.calibration

    def measured(self, taken: TakenStills, predict: Callable[..., Any] | None = None, seed: int = 0) -> Calibration:
        """What model and reconstruction are like on stills, from `take_stills`; `calibration` stays as it is."""
        generator = torch.Generator(taken[0].x.device).manual_seed(seed)
        with evaluating(self):
            return measure(unwrapped(self.model), taken, predict, lambda x: self.loss(x, generator=generator))

    def draw_mask(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random mask per image: bool [B, ceil(H / patch_size), ceil(W / patch_size)], True = visible."""
        grid = grid_to_mask(self.checked(images).shape[-2:], self.patch_size)
        return random_mask(len(images), grid, self.mask_ratio, generator=generator, device=images.device)

    def _visible_patches(self, mask: Tensor) -> int:
        """How many patches of each image a drawn mask shows; nothing is read from the device."""
        patches = mask[0].numel()
        return patches - hidden_patches(patches, self.mask_ratio)

    def _predict(self, images: Tensor, mask: Tensor, visible: int) -> Tensor:
        """Predict images [B, 3, H, W] from their `visible` patches: [B, 3, H', W'], zero-padded to `multiple`."""
        self.follow_model()
        padded = pad_to_multiple(images, self.multiple)  # [B, 3, H', W']
        height, width = padded.shape[-2:]
        with (
            self.pass_state.kept(),
            frozen_norms(self.norms),
            without_checkpointing(self.info.checkpointing),
            in_evaluation(self.info.token_droppers),
            returning_as_evaluated(self.info.module),
        ):
            try:
                encoded = self._encode(padded, mask, visible)
            except AssertionError as error:  # timm's way to refuse a size
                raise FrameError(
                    f"the model does not take images of {tuple(images.shape[-2:])} (H, W), padded to "
                    f"{tuple(padded.shape[-2:])}: {error}"
                ) from error
            maps = to_maps(encoded.raw, self.info.maps, encoded.size)  # [B, C_i, h_i, w_i] each, finest first
            prediction = self.decoder(Features(maps, encoded.raw, (height, width)))  # [B, 3, >= H', >= W']
        top, left = encoded.corner
        return prediction[..., top : top + height, left : left + width]

    def _encode(self, padded: Tensor, mask: Tensor, visible: int) -> Encoded:
        """What the encoder returns for images [B, 3, H', W'] without their hidden patches."""
        if self.masking == "tokens":
            return encode_visible_tokens(self.info, padded, mask, visible, self.patch_size, self.mask_token)
        if isinstance(self.mask_channel, MapMaskChannel):
            return encode_on_stem_map(self.info, padded, mask, self.patch_size, self.mask_channel)
        assert self._views is not None
        return encode_visible_pixels(self.info, padded, mask, self.patch_size, self.mask_channel, self._views)

    def _error(self, prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        """The loss of a prediction [B, 3, H', W'], a scalar."""
        return reconstruction_error(prediction, images, mask, self.patch_size, self.loss_on, self.norm_pix_loss)

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, *, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Reconstruction:
        """Reconstruct images from their visible patches, without a graph.

        Args:
            images: [B, 3, H, W] as the model takes them.
            mask: bool [B, H / patch_size, W / patch_size] (rounded up), True = visible, with the same number of visible
                patches in every image; drawn by default.
            generator: random source for the masks, on the images' device.

        Raises:
            ConfigError: the mask has another shape or type, or unequal numbers of visible patches.
        """
        mask = self.draw_mask(images, generator) if mask is None else mask
        h, w = self.checked(images).shape[-2:]
        visible = count_visible(mask, (len(images), *patch_grid((h, w), self.patch_size)))
        prediction = self._predict(images, mask, visible)  # [B, 3, H', W'], of the padded images
        loss = self._error(prediction, images, mask)
        if self.norm_pix_loss:
            prediction = denormalise_patches(prediction[..., :h, :w], images, self.patch_size)
        return Reconstruction(prediction[..., :h, :w], visible_pixels(mask, self.patch_size, (h, w)), loss)

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Everything that is random in the loss of `images`: the masks. See `SplitLoss`.

        What the pass has to find out by trial about images of a new size, it finds out here.
        """
        mask = self.draw_mask(images, generator)
        if self._views is not None and isinstance(self.mask_channel, MaskChannel):
            with self.pass_state.undone():
                look_once(padded_size(images.shape[-2:], self.multiple), self.mask_channel, self._views)
        return mask

    def weight(self, images: Tensor, mask: Tensor) -> Tensor:
        """How many pixels the loss is the mean of, a scalar on the device. See `SplitLoss`."""
        return pixels_counted(images, mask, self.patch_size, self.loss_on)

    def settings(self) -> tuple[float | str | bool, ...]:
        """The values of `SETTINGS`: what the loss depends on beside images, masks and weights."""
        return float(self.mask_ratio), self.loss_on, self.norm_pix_loss

    @contextmanager
    def using(self, **settings: Any) -> Iterator[MAEBranch]:
        """Inside the block, use another `mask_ratio`, `loss_on` or `norm_pix_loss`, for example at test time.

        Raises:
            ConfigError: another name, or a value out of range; nothing has changed.
        """
        if unknown := [name for name in settings if name not in SETTINGS]:
            raise ConfigError(
                f"{', '.join(map(repr, unknown))} cannot change after attaching; {', '.join(SETTINGS)} can"
            )
        own = dict(zip(SETTINGS, self.settings(), strict=True))
        wanted: dict[str, Any] = {**own, **settings}
        check_settings(self.masking, self.patch_size, **wanted)
        vars(self).update(settings)
        try:
            yield self
        finally:
            vars(self).update(own)

    def detach(self) -> None:
        """As `Attached.detach`."""
        super().detach()
        self._views = None
        for part in (self.decoder, getattr(self, "mask_channel", None)):
            if isinstance(part, HeadCopy | MaskChannel):
                part.detach()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `torch.nn.Module.load_state_dict`, but a state of another branch changes nothing.

        Raises:
            CheckpointError: keys or shapes differ; the message names them.
        """
        check_state(self.state_dict(), state_dict, "this branch")
        return super().load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        """The settings, for `print(branch)`."""
        return f"masking={self.masking!r}, patch_size={self.patch_size}, mask_ratio={self.mask_ratio}"

    @classmethod
    @examines
    @torch.inference_mode(False)  # weights made under inference mode could never learn
    def attach(
        cls,
        model: nn.Module,
        encoder: str | nn.Module = "auto",
        decoder: Decoder = "auto",
        masking: str = "auto",
        patch_size: int = 16,
        mask_ratio: float = 0.8,
        loss_on: str = "masked",
        *,
        norm_pix_loss: bool = False,
        image_size: int | tuple[int, int] | None = None,
    ) -> MAEBranch:
        """Attach a branch to `model`; the model itself does not change.

        Args:
            model: any module that takes images [B, 3, H, W].
            encoder: dotted path of the module where the encoder ends, or the module. All that the model runs up to
                and including it is the encoder. "auto" takes the deepest module on which all outputs depend and whose
                output still has a grid; `branch.info.path` names it, and `branch.info.alternatives` the others.
            decoder: "conv", "transformer", "copy_head", a module or a factory; "auto" takes "transformer" with token
                masking and "conv" with pixel masking.
            masking: "pixels" (hidden patches are filled with 0, and a mask channel tells the first convolution where),
                "tokens" (hidden tokens are never encoded; plain ViTs only), or "auto": tokens if the encoder allows it.
            patch_size: side of a mask patch in pixels. Token masking hides whole tokens and rounds it to the nearest
                multiple of the model's own patch.
            mask_ratio: share of patches to hide, in (0, 1).
            loss_on: "masked" (hidden patches only) or "all" pixels.
            norm_pix_loss: reconstruct patches that are normalised to zero mean and unit variance each.
            image_size: (H, W) or side of the random images that the model is examined with; by default a size that the
                model takes is found.

        Raises:
            ConfigError: a setting out of range.
            EncoderError: the encoder or its first convolution cannot be used; nothing has changed.
        """
        check_settings(masking, patch_size, mask_ratio, loss_on, norm_pix_loss)
        info = inspect_encoder(model, encoder, image_size)
        tokens = masks_tokens(masking, info)
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
        branch._try_masked_pass()
        return branch

    def _try_masked_pass(self) -> None:
        """Reconstruct a random image, to find out before any use whether model and decoder fit together.

        Raises:
            EncoderError: the pass fails, or its prediction has another size than the image.
        """
        images = self.info.probe_images()
        with evaluating(self.model), evaluating(self), torch.no_grad():
            mask = self.draw_mask(images, torch.Generator(images.device).manual_seed(0))
            try:
                prediction = self._predict(images, mask, int(mask[0].sum()))
            except EncoderError:
                raise
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


def _mask_channel(info: EncoderInfo) -> MaskChannel | MapMaskChannel:
    """The mask channel that fits the encoder's first layer."""
    if info.stem_map is not None:
        return MapMaskChannel(info.stem_map)
    assert isinstance(info.stem, nn.Conv2d)
    return MaskChannel(info.stem)
