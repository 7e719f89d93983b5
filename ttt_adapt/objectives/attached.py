"""Attached: what objectives with layers of their own behind an encoder share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ttt_adapt.errors import FrameError, StateError
from ttt_adapt.model.encoder import EncoderInfo

Self = TypeVar("Self", bound="Attached")


class Attached(nn.Module):
    """A module that reads the features of a model's encoder; its own layers lie outside the model.

    Args:
        info: the encoder, as `inspect_encoder` found it.
    """

    def __init__(self, info: EncoderInfo) -> None:
        super().__init__()
        self._info: EncoderInfo | None = info
        self._settled = False
        self._norms: list[nn.Module] | None = None

    @property
    def info(self) -> EncoderInfo:
        """What this is attached to."""
        if self._info is None:
            name = type(self).__name__
            raise StateError(f"this branch is detached: attach a new one with {name}.attach(model, ...)")
        return self._info

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.info.model

    def encoder_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, for all parameters that the encoder's features depend on."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] for name in self.info.parameters}

    @property
    def norms(self) -> list[nn.Module]:
        """The layers with running statistics that an encoder pass may touch.

        After `eval()` they are looked up once: it takes a walk over the model, and a stream does not change layers.
        """
        if self.training or not self._settled:
            return self.info.norms
        if self._norms is None:
            self._norms = self.info.norms
        return self._norms

    def train(self: Self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`."""
        self._settled, self._norms = not mode, None
        return super().train(mode)

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The label-free loss, a scalar with its graph, of images [B, 3, H, W] as the model takes them."""
        raise NotImplementedError

    def checked(self, images: Tensor) -> Tensor:
        """`images` themselves.

        Raises:
            FrameError: they are no float images [B, 3, H, W].
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise FrameError(f"got {got}; expected float images [B, 3, H, W], normalised as the model takes them")
        return images

    def detach(self) -> None:
        """Let go of the model. Nothing has to be undone on it; the weights here are kept. May be called twice."""
        self._info = None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
