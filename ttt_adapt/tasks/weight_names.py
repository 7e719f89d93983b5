"""The names that other libraries give to the weights of encoders that timm has, too, and how they become timm's.

Only pairs of models that compute the same are here: equal shapes are not enough, because models of one shape differ in
the padding of their convolutions and in the epsilon of their norms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import Tensor

from ttt_adapt.errors import CheckpointError

KINDS = {"layer_scale": "gamma"}
"""Last parts of names that mean the same as timm's."""


@dataclass(frozen=True)
class Naming:
    """How a library names the weights of a family of models.

    Attributes:
        library: its name.
        mark: a name that weights of this family have, and no others.
        encoders: patterns of the timm models that compute the same.
        renames: pairs (pattern, replacement) for `re.sub`, each applied to every name; () where the two libraries have
            the same weights in the same order.
        dropped: pattern of names that timm computes by itself; "" for none.
    """

    library: str
    mark: str
    encoders: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    dropped: str = ""

    def to_timm(
        self, state: Mapping[str, Tensor], encoder: str, full: Mapping[str, Tensor], source: str
    ) -> dict[str, Tensor]:
        """The weights under timm's names.

        Args:
            state: in the names of this library, in the order of its model.
            encoder: timm model name.
            full: the weights of timm's whole model, in their order.
            source: where they come from, for the message.

        Raises:
            CheckpointError: they are those of another model.
        """
        if not any(fnmatch(encoder.partition(".")[0], pattern) for pattern in self.encoders):
            raise CheckpointError(
                f"{source} has the names of {self.library}, and the encoder {encoder} is not known to compute the same "
                f"from them; encoders that do: {', '.join(self.encoders)}"
            )
        if not self.renames:
            return in_order(state, full, source, encoder)
        kept = {name: value for name, value in state.items() if not self.dropped or not re.search(self.dropped, name)}
        return {self._renamed(name): value for name, value in kept.items()}

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def _stages(pattern: str, replacement: str, first: int, shift: int) -> tuple[tuple[str, str], ...]:
    """Renames of the four stages of torchvision's ConvNeXt and Swin: every second of `features` is a stage."""
    return tuple((pattern.format(first + 2 * i), replacement.format(i + shift)) for i in range(4))


NAMINGS = (
    Naming("EfficientNet-PyTorch", "_conv_stem.weight", ("tf_efficientnet_lite*",)),
    Naming(
        "torchvision",
        "features.1.0.block.0.0.weight",
        ("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4"),
    ),
    Naming("torchvision", "features.1.conv.0.0.weight", ("mobilenetv2_100",)),
    Naming(
        "torchvision",
        "features.1.0.layer_scale",
        ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    ),
    Naming(
        "torchvision",
        "features.1.0.attn.relative_position_bias_table",
        ("swin_tiny_*", "swin_small_*", "swin_base_*"),
        (
            (r"^features\.0\.0\.", "patch_embed.proj."),
            (r"^features\.0\.2\.", "patch_embed.norm."),
            *_stages(r"^features\.{}\.(\d+)\.", r"layers.{}.blocks.\1.", 1, 0),
            *_stages(r"^features\.{}\.(norm|reduction)\.", r"layers.{}.downsample.\1.", 2, 1),
            (r"\.mlp\.0\.", ".mlp.fc1."),
            (r"\.mlp\.3\.", ".mlp.fc2."),
            (r"^head\.", "head.fc."),
        ),
        r"relative_position_index$",
    ),
    Naming(
        "torchvision",
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
        tuple(f"vit_{size}_patch[0-9][0-9]_[0-9][0-9][0-9]" for size in ("tiny", "small", "base", "large", "huge")),
        (
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.ln\.", "norm."),
            (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
            (r"\.ln_(\d)\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
            (r"^heads\.head\.", "head."),
        ),
    ),
)  # fmt: skip


def find_naming(state: Mapping[str, Tensor]) -> Naming | None:
    """The naming that these weights follow; None for timm's names, and for unknown ones."""
    return next((naming for naming in NAMINGS if naming.mark in state), None)


def known_encoders(library: str) -> list[str]:
    """Patterns of the timm models that take this library's weights under other names than timm's."""
    return [pattern for naming in NAMINGS if naming.library == library for pattern in naming.encoders]


def in_order(state: Mapping[str, Tensor], full: Mapping[str, Tensor], source: str, encoder: str) -> dict[str, Tensor]:
    """The tensors of `state` under the names of `full`, the first under the first name, and so on.

    Each pair must have the same shape, up to sides of length 1, and the same kind (weight, bias, running mean, ...).
    The tensors of one layer must be those of one layer in both. So equal shapes in another order do not pass. The last
    layer is the classifier: it is left out, and may have another number of classes or be missing.

    Raises:
        CheckpointError: a pair does not belong together; the message names it.
    """
    classifier = _split(list(full)[-1])[0]
    needed = {name: value for name, value in full.items() if _split(name)[0] != classifier}
    if len(state) not in (len(needed), len(full)):
        raise CheckpointError(
            f"{source} has {len(state)} tensors, and timm's {encoder} has {len(full)}, or {len(needed)} without its "
            "classifier: expected as many"
        )
    layers: dict[str, str] = {}
    owners: dict[str, str] = {}
    mapped = {}
    for (theirs, value), (name, own) in zip(state.items(), needed.items(), strict=False):
        (layer, kind), (own_layer, own_kind) = _split(theirs), _split(name)
        same_shape = [n for n in value.shape if n != 1] == [n for n in own.shape if n != 1]
        together = layers.setdefault(layer, own_layer) == own_layer and owners.setdefault(own_layer, layer) == layer
        if not same_shape or KINDS.get(kind, kind) != own_kind or not together:
            raise CheckpointError(
                f"{source} has {theirs} {tuple(value.shape)} where timm's {encoder} has {name} {tuple(own.shape)}: "
                "expected the same layers in the same order"
            )
        mapped[name] = value.reshape(own.shape)
    return mapped


def _split(name: str) -> tuple[str, str]:
    """The layer and the kind that a name consists of."""
    layer, _, kind = name.rpartition(".")
    return layer, kind
