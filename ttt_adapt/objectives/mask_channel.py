"""The mask channel: how a model for 3-channel images is told which pixels are hidden."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ttt_adapt.errors import EncoderError
from ttt_adapt.model.places import KEPT, find_places, moved_to, shows_all_in_place


class MaskChannel(nn.Module):
    """A fourth input channel for the model's first convolution, as a convolution of its own.

    A convolution over 4 channels is one over 3 channels plus one over the fourth. The model keeps the first;
    this module is the second, and `model.hooks.hidden_channel` adds the two. Its input is 1 = hidden and its weights
    start at zero, so that the model's output does not change before training, nor where nothing is hidden.

    A stem may pad by itself, by rules of its own (TensorFlow's "SAME", reflections). Where it does, its own forward is
    run, once for each size, to find out which pixel the convolution sees where; the mask is padded alike. Padding with
    constants is never hidden.

    Args:
        stem: the model's first convolution.
    """

    def __init__(self, stem: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(stem.out_channels, 1, *stem.kernel_size))
        self._stem: tuple[nn.Conv2d, ...] = (stem,)  # in a tuple: it is no module of the mask channel
        self._plain = type(stem).forward is nn.Conv2d.forward and stem.padding_mode == "zeros"
        self._known: OrderedDict[Any, tuple[Tensor | None, dict[str, Any]]] = OrderedDict()

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, 1, H, W], 1 = hidden -> [B, C, h, w], the shape of the stem's output.

        Raises:
            EncoderError: the stem is no convolution of the image.
        """
        places, settings = self.look((hidden.shape[-2], hidden.shape[-1]))
        return F.conv2d(hidden if places is None else moved_to(places, hidden), self.weight, None, **settings)

    def detach(self) -> None:
        """Let go of the stem; masks are not taken any more."""
        self._stem = ()

    @torch.inference_mode(False)
    @torch.no_grad()
    def look(self, size: tuple[int, int]) -> tuple[Tensor | None, dict[str, Any]]:
        """What the convolution in the stem sees of images of `size` (H, W), and its settings.

        Returns:
            Places from `find_places`, None where it sees the image itself, and stride, padding and dilation. They are
            found at the first call with this size.

        Raises:
            EncoderError: the stem is no convolution of the image.
        """
        stem = self._stem[0]
        if self._plain:
            return None, {"stride": stem.stride, "padding": stem.padding, "dilation": stem.dilation}
        key = (size, stem.weight.device)
        if key not in self._known:
            images = stem.weight.new_zeros(1, stem.in_channels, *size)
            settings = _convolution(stem.forward, images)[1]
            places = find_places(lambda x: _convolution(stem.forward, x)[0], images)
            if places is None:
                raise EncoderError(
                    f"the stem ({type(stem).__name__}) mixes pixels before it convolves them, so it cannot be told "
                    "which are hidden: name an encoder with another stem"
                )
            self._known[key] = None if shows_all_in_place(places, size) else places, settings
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def _convolution(forward: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first convolution in `forward(images)` is called with: its input, and stride, padding and dilation.

    Raises:
        EncoderError: there is none.
    """
    seen: list[dict[str, Any]] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.conv2d:
                seen.append({**dict(zip(_CONV2D, args, strict=False)), **(kwargs or {})})
            return func(*args, **(kwargs or {}))

    with Watch():
        forward(images)
    if not seen:
        raise EncoderError("the stem calls no 2-D convolution, so it cannot be told which pixels are hidden")
    return seen[0]["input"], {name: seen[0][name] for name in ("stride", "padding", "dilation") if name in seen[0]}


_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""The arguments of `torch.conv2d`, in their order."""
