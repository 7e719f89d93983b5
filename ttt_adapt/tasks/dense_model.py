"""The model that `ttt-adapt train` builds: a timm encoder and a light head that predict something for every pixel.

It is ordinary PyTorch. Your own model does not need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.objectives.decoders import Pyramid
from ttt_adapt.objectives.masking import pad_to_multiple
from ttt_adapt.tasks.pretrained import Pretrained, load_encoder, timm_for

_PLAIN_TRANSFORMERS = ("vision_transformer", "eva", "deit")
"""Modules of timm whose models have one grid of tokens from first to last: the head needs the last features alone."""


class DenseModel(nn.Module):
    """A timm encoder (`backbone`) and a pyramid head (`head`) for a dense task: some channels for every pixel.

    Args:
        encoder: name of a timm model with `features_only` support.
        classes: number of output channels: of classes, or of what else the task predicts for a pixel.
        width: inner channels of the head.
        pretrained: weights that the encoder starts from; None for random ones. The head does not depend on it.
        encoder_options: further keywords of `timm.create_model`.
    """

    def __init__(
        self,
        encoder: str,
        classes: int,
        *,
        width: int = 64,
        pretrained: Pretrained | None = None,
        encoder_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = _timm_encoder(encoder, pretrained, dict(encoder_options or {}))
        info: Any = self.backbone.feature_info
        strides: Sequence[int] = info.reduction()
        self.multiple = max(strides)
        self.shuffle = max(strides[0] // 4, 1)
        self.head = Pyramid(info.channels()[_first(strides) :], classes * self.shuffle**2, width)
        self.first = _first(strides)
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")  # timm's Swins

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] of any size -> [B, classes, H, W], such as logits of classes."""
        h, w = images.shape[-2:]
        padded = pad_to_multiple(images, self.multiple)
        maps = self.backbone(padded)[self.first :]
        if self.channels_last:
            maps = [each.permute(0, 3, 1, 2) for each in maps]
        logits = F.pixel_shuffle(self.head(maps), self.shuffle)
        full = F.interpolate(logits, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        return full[..., :h, :w]


def _first(strides: Sequence[int]) -> int:
    """Index of the first feature map that the head uses: a map of stride 2 costs more than it helps."""
    return 1 if strides[0] < 4 and len(strides) > 1 else 0


def _timm_encoder(name: str, pretrained: Pretrained | None, options: dict[str, Any]) -> nn.Module:
    timm = timm_for(name)
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    if family in _PLAIN_TRANSFORMERS:
        options = {"out_indices": (-1,), "dynamic_img_size": True, **options}
    elif family.startswith("swin_transformer"):
        options = {"strict_img_size": False, **options}
    download = pretrained is not None and pretrained.state is None
    try:
        encoder: nn.Module = timm.create_model(name, pretrained=download, features_only=True, **options)
    except Exception as error:  # constructors raise all kinds of errors over options, and a download over the network
        if download and _can_be_made(name, options):
            raise ConfigError(
                f"timm cannot load the pretrained weights of {name!r}, which it downloads from the Hugging Face hub "
                f"unless they are in its cache: {error}. Without a network, give a file or a package instead of timm"
            ) from error
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise ConfigError(f"timm cannot make {name!r} as an encoder of feature maps with {given}: {error}") from error
    if pretrained is not None and not download:
        load_encoder(encoder, name, options, pretrained)
    return encoder


def _can_be_made(name: str, options: dict[str, Any]) -> bool:
    """Whether timm makes the encoder without its pretrained weights."""
    import timm

    try:
        timm.create_model(name, features_only=True, **options)
    except Exception:  # as above
        return False
    return True
