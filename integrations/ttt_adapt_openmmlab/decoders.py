"""Which reconstruction decoder a model of mmsegmentation or mmdetection gets.

`copy_head`, the paper's choice, is a copy of the model's own head with another last layer. A Mask2Former or MaskFormer
head has queries in the place of a last convolution, and `MaskHeadCopy` copies it. The other heads of mmsegmentation end
in a convolution, and `MAEBranch.attach` copies them. Detectors that look at regions have no head that predicts a map of
the whole frame; they get a convolutional decoder.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ttt_adapt import MAEBranch
from ttt_adapt.errors import ConfigError, EncoderError, nearest
from ttt_adapt.integration import Features

ATTACH = frozenset(inspect.signature(MAEBranch.attach).parameters) - {"model"}  # the settings of a branch
QUERIES = ("query_feat", "query_embed")  # embeddings of a mask head with one row per query


class MaskHeadCopy(nn.Module):
    """A copy of a Mask2Former or MaskFormer head that predicts pixels: the paper's decoder.

    The pixel decoder and the transformer decoder are copied with their weights. The class head is left out, and there
    are 3 * s * s new queries for a mask stride of s (48 for s = 4). The mask maps of the last layer are pixel-shuffled
    to the frame.

    Args:
        model: the model; it is not changed.
        name: the attribute of `model` that is the head.
        specs: the feature maps of its backbone, as a decoder factory of `MAEBranch.attach` gets them.

    Raises:
        EncoderError: the backbone's output is not one [B, C, h, w] map per stride, as these heads take it.
    """

    def __init__(self, model: nn.Module, name: str, specs: Sequence[Any]) -> None:
        super().__init__()
        self.name, self.stride = name, specs[0].stride
        self.head = into_pixel_head(copy.deepcopy(getattr(model, name)), 3, self.stride)
        self.neck: nn.Module = copy.deepcopy(getattr(model, "neck", None)) or nn.Identity()
        self.requires_grad_(True)
        self._freeze_unused(_example(specs, next(self.head.parameters())))

    def forward(self, features: Features) -> Tensor:
        """Features -> image [B, 3, h * s, w * s] of the finest map h x w."""
        maps = self.neck(features.raw)
        size = features.image_size  # the head takes padding for a part of the image
        samples = [BaseDataElement(metainfo={"batch_input_shape": size, "img_shape": size}) for _ in maps[0]]
        return F.pixel_shuffle(self.head(maps, samples)[1][-1], self.stride)

    @torch.no_grad()
    def renew(self, model: nn.Module) -> None:
        """Copy the weights of the head (and of the neck) of `model` again, in place; the new queries stay."""
        own = self.state_dict()
        for part, source in (("head", getattr(model, self.name)), ("neck", getattr(model, "neck", None))):
            for key, value in (source.state_dict() if source is not None else {}).items():
                if f"{part}.{key}" in own and key.split(".")[0] not in QUERIES:
                    own[f"{part}.{key}"].copy_(value)

    def _freeze_unused(self, features: Features) -> None:
        """Freeze what the last layer's masks do not depend on: distributed training would wait for its gradient."""
        with torch.enable_grad():
            parameters = list(self.parameters())
            gradients = torch.autograd.grad(self(features).sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def into_pixel_head(head: Any, channels: int, stride: int) -> Any:
    """Turn a Mask2Former or MaskFormer head, in place, into one that predicts pixels.

    It loses its class head and gets a new query for each channel and each pixel of a stride. Pixel-shuffle its mask
    maps [B, channels * stride * stride, h, w] to get [B, channels, h * stride, w * stride].
    """
    head.cls_embed = nn.Identity()
    head.num_queries = channels * stride**2
    for query in filter(lambda query: hasattr(head, query), QUERIES):
        weight = getattr(head, query).weight
        setattr(head, query, nn.Embedding(head.num_queries, weight.shape[1]).to(weight))
    return head


def _example(specs: Sequence[Any], like: Tensor) -> Features:
    """Features of a small image, all ones, in the order in which the backbone returns them."""
    if sorted(spec.index for spec in specs) != list(range(len(specs))) or {s.layout for s in specs} != {"nchw"}:
        raise EncoderError(
            f"the backbone returns {[(spec.layout, spec.stride) for spec in specs]}; a copy of a mask head expects one "
            '[B, C, h, w] map per stride: use decoder="conv"'
        )
    side = 2 * max(spec.stride for spec in specs)
    raw = [
        torch.ones(1, spec.channels, side // spec.stride, side // spec.stride).to(like)
        for spec in sorted(specs, key=lambda spec: spec.index)
    ]
    return Features(raw, raw, (side, side))


def branch_settings(branch: Any, *others: str) -> dict[str, Any]:
    """Check a config's `branch`: keywords of `MAEBranch.attach`, or of `others`.

    Returns:
        A copy of it.

    Raises:
        ConfigError: not a mapping, or an unknown keyword.
    """
    if not isinstance(branch, Mapping):
        raise ConfigError(f"branch is {branch!r}; expected keywords such as dict(decoder='conv')")
    known = sorted({*ATTACH, *others})
    for name in branch:
        if name not in known:
            raise ConfigError(
                f"branch has no keyword {name!r}; {nearest(name, known)}; expected one of {', '.join(known)}"
            )
    return dict(branch)


def encoder_name(model: nn.Module) -> str:
    """The attribute of `model` that is its encoder: "backbone", or "image_encoder" beside a text encoder (SAN)."""
    found = (name for name in ("backbone", "image_encoder") if isinstance(getattr(model, name, None), nn.Module))
    return next(found, "backbone")


def branch_for(model: nn.Module, *, encoder: str | None = None, decoder: Any = "auto", **settings: Any) -> MAEBranch:
    """Attach a branch to a model of mmsegmentation or mmdetection.

    Like `MAEBranch.attach`, and decoder="copy_head" knows the heads of OpenMMLab. Where a head cannot be copied
    (two-stage and dense detectors), the branch gets the convolutional decoder, and the log says so. For a model that
    takes pixels up to 255 (YOLOX, backbones of caffe), `norm_pix_loss` is True by default: a squared error of such
    pixels is some thousand times the main loss.

    Args:
        model: the plain model, not a `JointMAE`.
        encoder: dotted path of the module where the encoder ends; by default `encoder_name`.
        decoder: as in `MAEBranch.attach`.
        **settings: the other keywords of `MAEBranch.attach`.

    Raises:
        EncoderError: the model has no such encoder, or the encoder cannot be used; nothing was changed.
        ConfigError: a setting out of range.
    """
    encoder = encoder_name(model) if encoder is None else encoder
    settings.setdefault("norm_pix_loss", _takes_large_pixels(model))
    if decoder != "copy_head":
        return MAEBranch.attach(model, encoder, decoder, **settings)
    name = _mask_head(model)
    try:
        if name is not None and encoder == "backbone":
            return MAEBranch.attach(model, encoder, lambda specs: MaskHeadCopy(model, name, specs), **settings)
        if name is None and hasattr(model, "decode_head"):
            return MAEBranch.attach(model, encoder, "copy_head", **settings)
        reason = (
            f"its {name} reads what the backbone returns" if name else "its head predicts no map of the whole frame"
        )
    except EncoderError as error:  # about the head; or about the encoder, and then the next attach raises it again
        reason = str(error)
    branch = MAEBranch.attach(model, encoder, "conv", **settings)
    print_log(
        f"copy_head does not fit {type(model).__name__} ({reason}): its branch gets the convolutional decoder",
        logger="current",
        level=logging.WARNING,
    )
    return branch


def _takes_large_pixels(model: nn.Module) -> bool:
    """Whether the model's data preprocessor leaves pixels at about 0 to 255, with or without their mean."""
    preprocessor = getattr(model, "data_preprocessor", None)
    normalises = getattr(preprocessor, "_enable_normalize", None)  # of mmengine and mmseg; None for any other
    if preprocessor is None or normalises is None:
        return False
    return not normalises or float(preprocessor.std.max()) < 10


def _mask_head(model: nn.Module) -> str | None:
    """The attribute of `model` that is a Mask2Former or MaskFormer head."""
    try:
        from mmdet.models.dense_heads import MaskFormerHead
    except ImportError:  # without mmdet there is no such head
        return None
    heads: Mapping[str, nn.Module] = dict(model.named_children())
    return next((name for name, head in heads.items() if isinstance(head, MaskFormerHead)), None)
