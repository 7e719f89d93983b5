"""HeadCopy: a decoder that is a copy of the model's own head."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError
from ttt_adapt.model.features import Features
from ttt_adapt.model.hooks import hooks, run_encoder


class HeadCopy(nn.Module):
    """A copy of everything behind the encoder, with a last layer that predicts pixels (the paper's decoder).

    The copy has the trained weights of the original. Only its last convolution is new: it has 3 * s * s outputs at its
    stride s, which are rearranged to pixels. What the model does after that layer (upsampling, softmax) does not run.

    Args:
        model: the user's model; it is not changed.
        path: dotted path of the encoder, a module that holds all of it.
        images: images [1, 3, H, W] to run the model on.

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
        """Copy the weights of the head of `model` again, in place; the new last layer keeps its own."""
        own = self.head.state_dict()
        for name, tensor in model.state_dict().items():
            if name in own and name.rpartition(".")[0] != self.last:
                own[name].copy_(tensor)

    def _freeze_unused(self, images: Tensor) -> None:
        """Let those parameters learn that the last layer's output depends on, and freeze the others."""
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
        images = like.new_zeros(1).expand(like.shape[0], 3, *features.image_size)  # the head may ask for their shape
        try:
            out = run_encoder(self.head, self.head.get_submodule(self.last), images)
        finally:
            stub.output = None
        return F.pixel_shuffle(out, self.stride)


class _Stub(nn.Module):
    """Stands in the place of the encoder in the copy, and returns features that were computed before."""

    output: Any = None

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.output


def _last_convolution(head: nn.Module, images: Tensor) -> tuple[str, torch.Size]:
    """Name and output shape of the last Conv2d that `head(images)` runs.

    Raises:
        EncoderError: a convolution runs before the encoder, or none behind it gives a map.
    """
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
